"""ONNX files in ONNX Runtime on the CPU."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qswin.qat.backends.findings import Finding
from qswin.qat.backends.registry import Backend, Listing, OpenOptions
from qswin.trt.engines.layers import graph_layers, layer_table
from qswin.trt.evaluation.compare import graph_activations
from qswin.trt.evaluation.timing import Subject, Timer, TimingOptions, wall_clock
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.runtime import OnnxRuntimePredictor


class OnnxSubject(Subject):
    """An ONNX file in ONNX Runtime, by the wall clock."""

    cpu_warmup = 2

    def __init__(self, path: Path, threads: int, timeout: float | None) -> None:
        self.predictor = predictor = OnnxRuntimePredictor(path, threads, timeout)
        device = f"CPU, {threads or 'all'} threads"
        self.row = {"model": path.name, "backend": "onnxruntime", "precision": predictor.precision, "device": device}
        self.preprocessing = predictor.preprocessing
        self.smallest, self.largest = predictor.batch_size or 1, predictor.batch_size

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        yield "", wall_clock(lambda: self.predictor(images))


class OnnxRuntime(Backend):
    name = "onnxruntime"
    suffixes = (".onnx",)

    def open(self, path: Path, options: OpenOptions) -> OnnxRuntimePredictor:
        return OnnxRuntimePredictor(path, options.threads, options.timeout)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        yield OnnxSubject(path, opening.threads, opening.timeout)

    def listing(self, path: Path, time: bool) -> Listing:
        if time:
            raise ValueError(f"{path}: --time is for engines; qswin bench times an ONNX file")
        graph = read_onnx(path)
        try:
            layers = graph_layers(graph)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Listing("layers", [dataclasses.asdict(layer) for layer in layers], layer_table(layers))

    def activations(
        self, path: Path, reference: Path, images: np.ndarray, opening: OpenOptions
    ) -> dict[str, np.ndarray]:
        return graph_activations(path, reference, images, opening.timeout)

    def findings(self) -> list[Finding]:
        """ONNX Runtime and its execution providers; qswin uses the CPU's."""
        if importlib.util.find_spec("onnxruntime") is None:
            return [Finding("onnxruntime", None, "to evaluate ONNX files: pip install onnxruntime")]
        import onnxruntime

        return [Finding("onnxruntime", onnxruntime.__version__, ", ".join(onnxruntime.get_available_providers()))]


BACKEND = OnnxRuntime()
