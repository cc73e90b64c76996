"""Checkpoints in torch: qswin's own, bare weights that a config file describes, and folders of transformers."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qswin.qat.backends.findings import Finding
from qswin.qat.backends.registry import Backend, Listing, OpenOptions
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.backends.torch_timing import torch_timer
from qswin.trt.evaluation.timing import Subject, Timer, TimingOptions

if TYPE_CHECKING:
    import torch

    from qswin.qat.checkpoint import Description

PRECISIONS = {"cuda": ("fp32", "fp16"), "cpu": ("fp32",)}


class CheckpointSubject(Subject):
    """A model in torch, by CUDA events on a GPU and by the wall clock elsewhere."""

    def __init__(
        self, path: Path, model: "torch.nn.Module", description: "Description", backend: str, precision: str
    ) -> None:
        import torch

        parameter = next(model.parameters())
        self._model, self._device, self._dtype = model, parameter.device, parameter.dtype
        cuda = self._device.type == "cuda"
        device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
        self.row = {"model": path.name, "backend": backend, "precision": precision, "device": device}
        self.preprocessing = description.preprocessing
        self.cpu_warmup = None if cuda else 1

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        import torch

        yield "", torch_timer(self._model, torch.from_numpy(images).to(self._device, self._dtype))


class Checkpoint(Backend):
    name = "torch"
    suffixes = (".safetensors", ".pth", ".pt", ".bin")

    def takes(self, path: Path) -> bool:
        return super().takes(path) or path.is_dir()

    def open(self, path: Path, options: OpenOptions) -> TorchPredictor:
        from qswin.qat.checkpoint import load_model

        device = str(_device(options))
        model, description, _ = load_model(path, options.config, list(options.overrides))
        return TorchPredictor(model, description, device)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        """FP32 and, on a GPU, FP16, each eager and, where that is asked for, under torch.compile."""
        import torch

        from qswin.qat.checkpoint import load_model

        device = _device(opening)
        with torch.inference_mode():
            for precision in PRECISIONS[device.type]:
                model, description, _ = load_model(path, opening.config, list(opening.overrides))
                model = model.to(device, torch.float16 if precision == "fp16" else torch.float32)
                yield CheckpointSubject(path, model, description, "torch", precision)
                if timing.compile:
                    model.compile(mode="max-autotune-no-cudagraphs")
                    yield CheckpointSubject(path, model, description, "torch.compile", precision)

    def listing(self, path: Path, time: bool) -> Listing:
        from qswin.qat.checkpoint import load_checkpoint
        from qswin.qat.quant.quantizers import quantizers, table

        if time:
            raise ValueError(f"{path}: --time is for engines; qswin bench times a checkpoint")
        model, _ = load_checkpoint(path)
        rows: list[dict[str, Any]] = [
            {"site": q.site, "format": q.spec.grid.name, "amax": q.amax.flatten().tolist()} for q in quantizers(model)
        ]
        return Listing("quantizers", rows, table(model))

    def findings(self) -> list[Finding]:
        """torch, asked in a process of its own: it need not be installed, and takes seconds to import."""
        if importlib.util.find_spec("torch") is None:
            return [Finding("torch", None, "for calibrate, train and export: pip install torch torchvision")]
        code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"
        version, cuda, count = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        return [Finding("torch", version, f"CUDA {cuda}, {count} GPUs" if cuda != "None" else "on CPUs only")]


def _device(options: OpenOptions) -> "torch.device":
    """The device that the options name, or of torchrun's local rank. Raises ValueError where it is missing."""
    from qswin.qat.distributed import process_group

    with process_group(options.device) as ranks:
        return ranks.device


BACKEND = Checkpoint()
