"""What this machine can do, and what is missing. It runs where torch is not installed."""

import platform

from qswin.qat.backends.findings import Finding, library
from qswin.qat.backends.registry import backends
from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.engine import NO_RTX

OPTIONAL = {  # {distribution: what it is for, and what pip is to install}
    "timm": ("Swin, ViT", None),
    "transformers": ("CvT", "'qswin[cvt]'"),
    "medpy": ("HD95 of masks", "'qswin[segmentation]'"),
    "matplotlib": ("--plot", "'qswin[plot]'"),
    "onnx-graphsurgeon": ("build --fold", None),
    "nvidia-dali-cuda130": ("data.decoder=dali", "'qswin[dali]'"),
}


def gpu() -> Finding:
    """The first GPU."""
    found = find_gpu()
    if found is None:
        return Finding("GPU", None, "for training, and to run engines: an NVIDIA GPU and its driver")
    rtx = "no TensorRT-RTX" if found.capability in NO_RTX else "TensorRT-RTX too"
    return Finding("GPU", f"{found.name}, compute capability {found.capability}", f"TensorRT; {rtx}")


def examine() -> list[Finding]:
    """Everything that qswin can use: Python, the GPU, what each backend needs, and optional libraries."""
    python = Finding("Python", platform.python_version(), f"{platform.system()} {platform.machine()}")
    needed = [finding for backend in backends() for finding in backend.findings()]
    return [python, gpu(), *needed, *(library(name, *rest) for name, rest in OPTIONAL.items())]
