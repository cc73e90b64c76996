"""Which TensorRT is installed and what it can do: the one place with version tests."""

import dataclasses
import importlib
import sys
from typing import Any

TARGETS = ("tensorrt", "tensorrt-rtx")
INSTALL = {
    "tensorrt": "pip install tensorrt",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a version of TensorRT can do.

    `weak_typing`: precision is chosen by builder flags and layer precisions; without it, the types written in the ONNX
    graph decide. `implicit_int8`: INT8 from a calibration cache, with no Q/DQ in the graph. `needs_gpu`: to build.
    `newest_opset`: of the ONNX graphs it parses. `fp8`: whether it takes Q/DQ of FLOAT8E4M3FN.
    """

    weak_typing: bool
    implicit_int8: bool
    needs_gpu: bool
    newest_opset: int
    fp8: bool


def capabilities(target: str, version: str) -> Capabilities:
    """What `version` ("8.6.0") of `target` can do, by NVIDIA's release notes: 11 has no weak typing or calibrators."""
    if target == "tensorrt-rtx":
        return Capabilities(weak_typing=False, implicit_int8=False, needs_gpu=False, newest_opset=22, fp8=True)
    major = int(version.split(".")[0])
    return Capabilities(
        weak_typing=major < 11,
        implicit_int8=major < 11,
        needs_gpu=True,
        newest_opset=17 if major < 10 else 20,
        fp8=major >= 10,
    )


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT or TensorRT-RTX."""

    target: str
    version: str
    can: Capabilities

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.target == 'tensorrt-rtx' else 'TensorRT'} {self.version}"


def find_tensorrt(target: str) -> TensorRT:
    """Finds the installed TensorRT, and has Polygraphy use it. A process can use one of the two.

    Raises:
        ValueError: `target` is unknown or not installed (the command that installs it is named), or the process already
            uses the other one.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known; choose {' or '.join(TARGETS)}")
    rtx = target == "tensorrt-rtx"
    try:
        module = importlib.import_module("tensorrt_rtx_bindings" if rtx else "tensorrt")
    except ImportError as error:
        raise ValueError(f"{target} is not installed ({error}): {INSTALL[target]}") from error
    if rtx:  # the wheels install the bindings under this name; Polygraphy asks for the other
        sys.modules.setdefault("tensorrt_rtx", module)
    from polygraphy import config
    from polygraphy.logger import G_LOGGER

    if "polygraphy.backend.trt" in sys.modules and config.USE_TENSORRT_RTX != rtx:
        raise ValueError("one process cannot use both TensorRT and TensorRT-RTX; run the command again by itself")
    config.USE_TENSORRT_RTX = rtx
    G_LOGGER.module_severity, G_LOGGER.colors = G_LOGGER.ERROR, False
    return TensorRT(target, module.__version__, capabilities(target, module.__version__))


def tensorrt_module() -> Any:
    """The module of the TensorRT that this process uses, tensorrt or tensorrt_rtx: the one that Polygraphy uses."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    return lazy_import_trt()
