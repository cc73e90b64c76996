"""A backend from outside the repository: programs of torch.export (.ep) in evaluate, bench, inspect and doctor."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from qswin import Description
from qswin.qat.backends.findings import Finding, library
from qswin.qat.backends.registry import Backend, OpenOptions, register
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.trt.evaluation.timing import Subject, TimingOptions, wall_clock


def save_program(path: Path, model: torch.nn.Module, description: Description) -> None:
    """Exports a model for any batch, with its description inside the file."""
    example = torch.randn(2, 3, *description.preprocessing.size)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"qswin.json": json.dumps(description.to_dict())})


def load_program(path: Path) -> TorchPredictor:
    extra = {"qswin.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return TorchPredictor(program.module(), Description.from_dict(json.loads(extra["qswin.json"])), "cpu")


class ProgramSubject(Subject):
    """A program on the CPU, by the wall clock."""

    cpu_warmup = 1

    def __init__(self, path: Path) -> None:
        self.predictor = predictor = load_program(path)
        self.row = {"model": path.name, "backend": "torch.export", "precision": predictor.precision, "device": "CPU"}
        self.preprocessing = predictor.preprocessing

    def timers(self, images, cuda_graph):
        yield "", wall_clock(lambda: self.predictor(images))


class ExportedProgram(Backend):
    name = "torch.export"
    suffixes = (".ep",)

    def open(self, path: Path, options: OpenOptions) -> TorchPredictor:
        return load_program(path)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        yield ProgramSubject(path)

    def findings(self) -> list[Finding]:
        return [library("torch", "programs of torch.export (.ep)")]


register(ExportedProgram())
