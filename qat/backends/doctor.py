"""What this machine can do, and what is missing: the command `qswin doctor`. It runs where torch is not installed."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.engine import NO_RTX
from qswin.trt.engines.version import INSTALL, TARGETS, capabilities


class Finding(NamedTuple):
    """A thing that was looked for: what was found and allows, or None and the command that adds it."""

    name: str
    found: str | None
    note: str


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def library(distribution: str, needed_for: str, install: str | None = None) -> Finding:
    """A Python library."""
    found = version_of(distribution)
    missing = f"for {needed_for}: pip install {install or distribution}"
    return Finding(distribution, found, needed_for if found else missing)


def gpu() -> Finding:
    """The first GPU."""
    found = find_gpu()
    if found is None:
        return Finding("GPU", None, "for training, and to run engines: an NVIDIA GPU and its driver")
    rtx = "no TensorRT-RTX" if found.capability in NO_RTX else "TensorRT-RTX too"
    return Finding("GPU", f"{found.name}, compute capability {found.capability}", f"TensorRT; {rtx}")


def torch_devices() -> Finding:
    """torch, asked in a process of its own: it need not be installed, and takes seconds to import."""
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", None, "for calibrate, train and export: pip install torch torchvision")
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"
    version, cuda, count = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    return Finding("torch", version, f"CUDA {cuda}, {count} GPUs" if cuda != "None" else "on CPUs only")


def onnx_runtime() -> Finding:
    """ONNX Runtime and its execution providers; qswin uses the CPU's."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("onnxruntime", None, "to evaluate ONNX files: pip install onnxruntime")
    import onnxruntime

    return Finding("onnxruntime", onnxruntime.__version__, ", ".join(onnxruntime.get_available_providers()))


def tensorrt(target: str) -> Finding:
    """A TensorRT, and what its version allows."""
    distributions = (
        ("tensorrt_rtx_cu13_bindings",) if target == "tensorrt-rtx" else ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
    )
    found = next((version for version in map(version_of, distributions) if version), None)
    if found is None:
        return Finding(target, None, f"to build engines: {INSTALL[target]}")
    can = capabilities(target, found)
    notes = [
        "weak typing" if can.weak_typing else "strong typing only",
        "calibration caches" if can.implicit_int8 else "no calibration caches",
        "builds on its GPU" if can.needs_gpu else "builds on any machine",
        f"opset {can.newest_opset} at most",
    ]
    return Finding(target, found, ", ".join(notes))


OPTIONAL: tuple[Callable[[], Finding], ...] = (
    lambda: library("timm", "Swin, ViT"),
    lambda: library("transformers", "CvT", "'qswin[cvt]'"),
    lambda: library("medpy", "HD95 of masks", "'qswin[segmentation]'"),
    lambda: library("matplotlib", "--plot", "'qswin[plot]'"),
    lambda: library("onnx-graphsurgeon", "build --fold"),
    lambda: library("nvidia-dali-cuda130", "data.decoder=dali", "'qswin[dali]'"),
)


def examine() -> list[Finding]:
    """Everything that qswin can use."""
    python = Finding("Python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    engines = [tensorrt(target) for target in TARGETS]
    return [python, torch_devices(), gpu(), onnx_runtime(), *engines, *(look() for look in OPTIONAL)]
