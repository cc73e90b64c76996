"""A model repository of the Triton Inference Server: each model as it is, and an ensemble that takes image files.

The configs are text of the server's ModelConfig. Of what a backend cannot batch by itself `max_batch_size` is 0, and
the batch is a dimension like any other.
"""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from qswin.trt.engines.engine import SUFFIXES as ENGINES
from qswin.trt.package.artefacts import ONNX, PACKAGE, Artefact

LARGEST_BATCH = 64  # of an ONNX graph, which takes any
DELAY = 2000  # microseconds that a request may wait for others
PREPROCESS, ENSEMBLE = "_preprocess", "_ensemble"


@dataclasses.dataclass(frozen=True)
class Backend:
    """How the server runs a kind of file.

    Attributes:
        input, output: its tensors' names. PyTorch's backend names them by their order.
    """

    name: str
    platform: str
    file: str
    input: str = "input"
    output: str = "logits"


TENSORRT = Backend("tensorrt", "tensorrt_plan", "model.plan")
BACKENDS = {
    ONNX: Backend("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    **dict.fromkeys(ENGINES, TENSORRT),
    PACKAGE: Backend("pytorch", "torch_aoti", "model.pt2", "INPUT__0", "OUTPUT__0"),
}


def is_served(artefact: Artefact) -> bool:
    """Whether Triton has a backend for a file: it has none for bundles and for engines of TensorRT-RTX."""
    return artefact.suffix in BACKENDS and (artefact.built is None or artefact.built.target != "tensorrt-rtx")


def model_name(artefact: Artefact) -> str:
    """`int8_onnx` of int8.onnx."""
    return re.sub(r"[^\w-]", "_", artefact.path.name, flags=re.ASCII)


def largest_batch(artefact: Artefact) -> int:
    """`max_batch_size`: of files that take every batch up to it; 0 of others.

    PyTorch's backend does not batch torch_aoti, and an engine of a few batch sizes would get others.
    """
    built = artefact.built
    if artefact.suffix == PACKAGE or artefact.batch is not None:
        return 0
    if built is None:
        return LARGEST_BATCH
    every = built.batch_sizes is None and built.profile is not None and built.profile[0] == 1
    return built.profile[2] if every and built.profile else 0


def write_repository(root: Path, served: Sequence[Artefact], templates: Path) -> None:
    """Writes `root`: three folders for each model. Labels and preprocessing are copied from the folder around it.

    Raises:
        ValueError: two files would get one name.
    """
    names = [model_name(artefact) for artefact in served]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two files would be the model {twice[0]!r}; rename one, with its sidecar")
    for name, artefact in zip(names, served, strict=True):
        _write_model(root / name, artefact)
        _write_preprocess(root / f"{name}{PREPROCESS}", artefact, templates)
        (root / f"{name}{ENSEMBLE}" / "1").mkdir(parents=True)
        (root / f"{name}{ENSEMBLE}" / "config.pbtxt").write_text(ensemble_config(artefact))


def _write_model(folder: Path, artefact: Artefact) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(model_config(artefact))
    shutil.copyfile(folder.parents[1] / "labels.txt", folder / "labels.txt")
    shutil.copyfile(artefact.path, folder / "1" / BACKENDS[artefact.suffix].file)


def _write_preprocess(folder: Path, artefact: Artefact, templates: Path) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(preprocess_config(artefact))
    shutil.copyfile(templates / "triton_model.py.in", folder / "1" / "model.py")
    for name in ("preprocess.py", "preprocessing.json"):
        shutil.copyfile(folder.parents[1] / name, folder / "1" / name)


def tensor(kind: str, name: str, data_type: str, dims: Sequence[int], more: str = "") -> str:
    """An input or output of a config."""
    return f'{kind} {{ name: "{name}" data_type: {data_type} dims: [{", ".join(map(str, dims))}]{more} }}\n'


def with_batch(artefact: Artefact, dims: Sequence[int]) -> list[int]:
    """The dimensions that a config lists of a tensor: without the batch where the server batches."""
    return [*([] if largest_batch(artefact) else [artefact.batch or -1]), *dims]


def image_dims(artefact: Artefact) -> list[int]:
    """Of image files: one a row where the server batches, else one for each image of the batch."""
    return [1] if largest_batch(artefact) else [artefact.batch or -1]


def head(name: str, artefact: Artefact) -> str:
    return f'name: "{name}"\nmax_batch_size: {largest_batch(artefact)}\n'


def batching(artefact: Artefact) -> str:
    delay = f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY} }}\n"
    return delay if largest_batch(artefact) else ""


def model_config(artefact: Artefact) -> str:
    """Of the model itself. An ONNX graph runs on the CPU: ONNX Runtime computes Q/DQ in float on a GPU."""
    backend = BACKENDS[artefact.suffix]
    pixels = with_batch(artefact, (3, *artefact.preprocessing.size))
    logits, labels = with_batch(artefact, (len(artefact.labels),)), ' label_filename: "labels.txt"'
    return (
        head(model_name(artefact), artefact)
        + f'backend: "{backend.name}"\nplatform: "{backend.platform}"\n'
        + tensor("input", backend.input, "TYPE_FP32", pixels)
        + tensor("output", backend.output, "TYPE_FP32", logits, labels)
        + f"instance_group {{ kind: KIND_{'CPU' if artefact.suffix == ONNX else 'GPU'} }}\n"
        + batching(artefact)
    )


def preprocess_config(artefact: Artefact) -> str:
    """Of the step that decodes image files."""
    return (
        head(model_name(artefact) + PREPROCESS, artefact)
        + 'backend: "python"\n'
        + tensor("input", "image", "TYPE_STRING", image_dims(artefact))
        + tensor("output", "pixels", "TYPE_FP32", with_batch(artefact, (3, *artefact.preprocessing.size)))
        + "instance_group { count: 2 kind: KIND_CPU }\n"
    )


def ensemble_config(artefact: Artefact) -> str:
    """Of both, one after the other."""
    name, backend = model_name(artefact), BACKENDS[artefact.suffix]
    steps = (
        step(name + PREPROCESS, ("image", "image"), ("pixels", "pixels")),
        step(name, (backend.input, "pixels"), (backend.output, "logits")),
    )
    return (
        head(name + ENSEMBLE, artefact)
        + 'platform: "ensemble"\n'
        + tensor("input", "image", "TYPE_STRING", image_dims(artefact))
        + tensor("output", "logits", "TYPE_FP32", with_batch(artefact, (len(artefact.labels),)))
        + f"ensemble_scheduling {{\n{''.join(steps)}}}\n"
    )


def step(name: str, taken: tuple[str, str], given: tuple[str, str]) -> str:
    """A step of an ensemble: (the model's tensor, the ensemble's)."""
    maps = (
        f'{kind} {{ key: "{key}" value: "{value}" }}'
        for kind, (key, value) in (("input_map", taken), ("output_map", given))
    )
    return f'  step {{ model_name: "{name}" model_version: -1 {" ".join(maps)} }}\n'
