"""The layers of an engine or an ONNX file: kinds, precisions, fusions, times. The library of `qswin inspect`."""

import dataclasses
from pathlib import Path

from qswin.calib.data.images import noise_images
from qswin.trt.engines.engine import SUFFIXES, Engine
from qswin.trt.engines.layers import Layer, engine_layers, graph_layers
from qswin.trt.graphs.files import read_onnx

RUNS = 20  # whose times are averaged


def timed_layers(engine: Engine) -> list[Layer]:
    """An engine's layers with the mean time of each at the largest batch, by TensorRT's own profiler."""
    import tensorrt as trt

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.total: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.total[layer_name] = self.total.get(layer_name, 0.0) + ms

    engine.load(noise_images(engine.largest, engine.preprocessing))
    for _ in range(3):  # warms up unmeasured
        engine.run_loaded()
    engine.context.profiler = profiler = Profiler()
    for _ in range(RUNS):
        engine.run_loaded()
    return [
        dataclasses.replace(layer, ms=profiler.total[layer.name] / RUNS if layer.name in profiler.total else None)
        for layer in engine_layers(engine.engine)
    ]


def read_layers(path: Path, time: bool) -> list[Layer]:
    """The layers of a file. Raises ValueError when times are asked of an ONNX file, or it is of another kind."""
    if path.suffix == ".onnx":
        if time:
            raise ValueError(f"{path}: --time is for engines; qswin bench times an ONNX file")
        return graph_layers(read_onnx(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: not an .onnx file or an engine ({', '.join(SUFFIXES)})")
    engine = Engine(path)
    return timed_layers(engine) if time else engine_layers(engine.engine)
