"""A calibrated checkpoint as a bundle, on any machine: it is lowered, traced, assembled and compiled."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from tqdm import tqdm
from triton.runtime.jit import JITFunction

from qswin.calib.files import version_of
from qswin.qat.bundle.assemble import assemble
from qswin.qat.bundle.contents import Bundle, Cubin, Kernel
from qswin.qat.bundle.cubins import compile_kernel, without_line_numbers
from qswin.qat.bundle.format import write_bundle
from qswin.qat.bundle.trace import trace
from qswin.qat.checkpoint import open_checkpoint
from qswin.qat.lowering.lower import lower
from qswin.qat.quant.quantizers import check_precision

USUAL = (80, 86, 89, 90)
OLDEST = {"int8": 80, "fp8": 89}  # architectures with the kernels' instructions


def bundle_without_code(
    lowered: nn.Module, size: tuple[int, int], batch_sizes: Sequence[int], model: dict[str, Any]
) -> tuple[Bundle, list[Any]]:
    """A bundle of a lowered model for some batch sizes, and its kernels' Triton functions, which are to be compiled.

    Args:
        lowered: from `qswin.qat.lowering.lower.lower`, its residual stream in FP16.
        size: (H, W) of the images.
        model: what the manifest says of it.
    """
    bundle, examples = assemble({batch: trace(lowered, (batch, 3, *size)) for batch in batch_sizes}, model)
    return bundle, [launch.kernel for launch in examples]


def compile_all(functions: Sequence[Any], kernels: Sequence[Kernel], arch: int) -> tuple[Cubin, ...]:
    """The cubins of a bundle's kernels for an architecture, compiled on all cores."""
    if not all(isinstance(function, JITFunction) for function in functions):
        raise ValueError("kernels cannot be compiled while TRITON_INTERPRET is set in the environment; unset it")
    with without_line_numbers(), ThreadPoolExecutor() as pool:
        compiled = pool.map(compile_kernel, functions, kernels, [arch] * len(kernels))
        return tuple(tqdm(compiled, f"sm_{arch}", len(kernels), disable=not sys.stderr.isatty()))


def build_bundle(
    path: Path, precision: str, architectures: Sequence[int] | None, batch_sizes: Sequence[int]
) -> tuple[bytes, dict[str, Any]]:
    """Builds a bundle from a checkpoint that was calibrated with recipe `attention` or `attention-fp8`.

    Args:
        precision: int8, fp8 or best, which stands for the checkpoint's.
        architectures: that it holds code for; None stands for those of `USUAL` that have the precision.

    Returns:
        The bundle's bytes, and what its sidecar says of it.

    Raises:
        FileNotFoundError: the checkpoint or its sidecar is missing.
        ValueError: the checkpoint is of another precision, an architecture lacks it, or the kernels lack what the model
            needs (it is named).
    """
    model, description, digest = open_checkpoint(path)
    own = check_precision(model, precision, f"{path}:")
    if architectures is None:
        architectures = [arch for arch in USUAL if arch >= OLDEST[own]]
    if old := [arch for arch in architectures if arch < OLDEST[own]]:
        raise ValueError(f"--arch {old[0]}: {own} needs {OLDEST[own]} or newer")
    start, size = time.perf_counter(), description.preprocessing.size
    lowered = lower(model, torch.zeros(1, 3, *size), torch.float16)
    values = {
        **description.to_dict(),
        "checkpoint": path.name,
        "parent": digest,
        "engine_precision": own,
        "versions": {name: version_of(name) for name in ("qswin", "torch", "triton")},
    }
    bundle, functions = bundle_without_code(lowered, size, batch_sizes, values)
    code = {arch: compile_all(functions, bundle.manifest.kernels, arch) for arch in sorted(architectures)}
    data = write_bundle(bundle._replace(code=code))
    return data, {
        **values,
        "target": "bundle",
        "version": triton.__version__,
        "architectures": sorted(architectures),
        "batch_sizes": list(batch_sizes),
        "kernels": len(functions),
        "workspace": {str(batch.size): batch.workspace for batch in bundle.batches},
        "seconds": round(time.perf_counter() - start, 1),
    }
