"""The target `inductor`: a calibrated checkpoint as an AOTInductor package (.pt2) that runs the project's kernels.

A package holds compiled code and weights as levels: running it needs torch and a GPU of its compute capability, but
neither qswin nor timm. It is code: load only packages you built yourself.
"""

import dataclasses
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qswin.calib.data.batches import fill_up, joined
from qswin.qat.backends.findings import Finding, library
from qswin.qat.backends.registry import Backend, OpenOptions
from qswin.qat.backends.torch_timing import captured, torch_timer
from qswin.trt.engines.engine import BuiltModel
from qswin.trt.evaluation.timing import CUDA_GRAPH, Subject, Timer, TimingOptions

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".pt2"
TARGET = "inductor"
KIND = "package"
OLDEST_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}  # of the kernels' instructions


@dataclasses.dataclass(frozen=True)
class PackageOptions:
    """How to build a package. The names are those of the flags of `qswin build`.

    Attributes:
        precision: int8 or fp8, of which the checkpoint must be; best stands for the checkpoint's.
        batch_sizes: smallest, usual and largest batch. One fixed batch runs faster: tiles are then chosen for it.
    """

    target: str = TARGET
    precision: str = "best"
    batch_sizes: tuple[int, int, int] = (1, 8, 64)

    def __post_init__(self) -> None:
        if self.precision not in (*OLDEST_CAPABILITY, "best"):
            raise ValueError(
                f"--precision {self.precision} is not for --target {TARGET}, which builds int8 or fp8 of a --checkpoint"
            )


def compile_package(model: "nn.Module", size: tuple[int, int], profile: tuple[int, int, int]) -> bytes:
    """Compiles a lowered model on a GPU, its residual stream in FP16, for float32 images and logits.

    Args:
        model: from `qswin.qat.lowering.lower.lower`, with FP16 parameters, on the GPU.
        size: (H, W) of the images.
        profile: smallest, usual and largest batch. One fixed batch runs faster: tiles are then chosen for it.

    Raises:
        ValueError: the C++ compiler made a library that torch could not load.
    """
    import torch
    from torch._inductor import aoti_compile_and_package

    from qswin.qat.lowering.layers import Float32Interface

    low, usual, high = profile
    example = torch.zeros(usual, 3, *size, device=next(model.parameters()).device)
    batch = None if low == high else ({0: torch.export.Dim("batch", min=low, max=high)},)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(Float32Interface(model).eval(), (example,), dynamic_shapes=batch)
        package = Path(aoti_compile_and_package(program, package_path=f"{folder}/model{SUFFIX}")).read_bytes()
    check_linkage(package)
    return package


def check_linkage(package: bytes) -> None:
    """Raises ValueError when the package's library holds a C++ library of its own: beside torch's it would crash."""
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        for name in archive.namelist():
            if name.endswith(".so") and b"libstdc++.so" not in archive.read(name):
                raise ValueError(
                    f"{os.environ.get('CXX', 'g++')} linked libstdc++ into the package, which would crash torch"
                    " when it is loaded; set CXX to a compiler that links it dynamically,"
                    " such as /usr/bin/g++, and build again"
                )


def build_package(path: Path, precision: str, profile: tuple[int, int, int]) -> tuple[bytes, dict[str, Any]]:
    """Builds a package from a checkpoint that was calibrated with recipe `attention` or `attention-fp8`.

    Args:
        precision: int8, fp8 or best; see `PackageOptions`.
        profile: smallest, usual and largest batch.

    Returns:
        The package, and what its sidecar says of it.

    Raises:
        FileNotFoundError: the checkpoint or its sidecar is missing.
        ValueError: there is no GPU that can run it, the checkpoint is of another precision, or the kernels lack what it
            needs (it is named).
    """
    import torch

    from qswin.qat.checkpoint import open_checkpoint
    from qswin.qat.lowering.lower import lower
    from qswin.qat.quant.quantizers import check_precision

    model, description, digest = open_checkpoint(path)
    own = check_precision(model, precision, f"{path}:")
    capability = check_gpu(own)
    start, size = time.perf_counter(), description.preprocessing.size
    lowered = lower(model.cuda(), torch.zeros(1, 3, *size, device="cuda"), torch.float16)
    package = compile_package(lowered, size, profile)
    return package, {
        **description.to_dict(),
        "checkpoint": path.name,
        "parent": digest,
        "target": TARGET,
        "version": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "capability": capability,
        "engine_precision": own,
        "profile": profile,
        "seconds": round(time.perf_counter() - start, 1),
    }


def check_gpu(precision: str) -> str:
    """The GPU's compute capability, "9.0". Raises ValueError without a GPU, and for one that is too old for it."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "--target inductor needs an NVIDIA GPU, and torch finds none; --target tensorrt-rtx builds without"
        )
    capability = torch.cuda.get_device_capability()
    oldest = OLDEST_CAPABILITY[precision]
    if capability < oldest:
        needed, found = ("{}.{}".format(*each) for each in (oldest, capability))
        device = torch.cuda.get_device_name()
        raise ValueError(f"{precision} on --target inductor needs compute capability {needed}; {device} has {found}")
    return "{}.{}".format(*capability)


class Package(BuiltModel):
    """A package on the GPU; a qswin.trt.evaluation.evaluate.Predictor.

    Raises:
        FileNotFoundError: the package or its sidecar is missing.
        ValueError: it was built for another GPU or by another torch.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes() if path.is_file() else b""
        super().__init__(path, KIND, data)
        import torch
        from torch._inductor import aoti_load_package

        capability, version = self.sidecar.capability, self.sidecar.version
        if (found := check_gpu(self.precision)) != capability:
            raise ValueError(f"{path}: built for compute capability {capability}, here is {found}; build it again")
        if torch.__version__ != version:
            raise ValueError(f"{path}: built by torch {version}, here is {torch.__version__}; build it again here")
        # Without locks between threads, which cannot become part of a CUDA graph.
        self.run: Any = aoti_load_package(io.BytesIO(data), run_single_threaded=True)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32 -> logits, or `joined` maps, float32; N up to `largest`, filled up to `smallest`."""
        import torch

        from qswin.qat.ptq.prediction import named_outputs

        outputs = named_outputs(self.run(torch.from_numpy(fill_up(images, self.smallest)).cuda()))
        return joined([output[: len(images)].cpu().numpy() for output in outputs.values()])


class PackageSubject(Subject):
    """A package with its input on the GPU, by CUDA events."""

    def __init__(self, path: Path) -> None:
        import torch

        self.package = package = Package(path)
        device = torch.cuda.get_device_name()
        self.row = {"model": path.name, "backend": package.backend, "precision": package.precision, "device": device}
        self.preprocessing, self.smallest, self.largest = package.preprocessing, package.smallest, package.largest

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        import torch

        on_gpu = torch.from_numpy(images).cuda()
        yield "", torch_timer(self.package.run, on_gpu)
        if cuda_graph:
            yield CUDA_GRAPH, torch_timer(captured(self.package.run, on_gpu), on_gpu)


class Inductor(Backend):
    name = TARGET
    suffixes = (SUFFIX,)
    targets = (TARGET,)
    sources = {"checkpoint": PackageOptions}
    kind = KIND

    def open(self, path: Path, options: OpenOptions) -> Package:
        return Package(path)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        yield PackageSubject(path)

    def build(self, source: Path, output: Path, options: PackageOptions) -> tuple[bytes, dict[str, Any]]:
        return build_package(source, options.precision, options.batch_sizes)

    def findings(self) -> list[Finding]:
        return [library("triton", "build --target inductor")]


BACKEND = Inductor()
