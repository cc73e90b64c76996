"""The layers of an engine or an ONNX file: kinds, precisions, fusions, times. The library of `qswin inspect`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from calib.files import write_json
from calib.images import noise_images
from trt.engine import SUFFIXES, Engine
from trt.layers import Layer, engine_layers, graph_layers, layer_table
from trt.onnx_files import read_onnx

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists what a model consists of: quantizers of a checkpoint, layers of an engine or ONNX file."
    parser.epilog = (
        "example:\n  qswin inspect --model runs/x/ptq.safetensors\n  qswin inspect --model runs/x/int8.engine --time"
    )
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, an .onnx file or an engine")
    parser.add_argument("--time", action="store_true", help="of each of an engine's layers")
    parser.add_argument("--json", type=Path)


def main(args: argparse.Namespace) -> None:
    layers = read_layers(args.model, args.time)
    print(layer_table(layers))
    if args.json:
        rows: list[dict[str, Any]] = [dataclasses.asdict(layer) for layer in layers]
        write_json(args.json, {"model": str(args.model), "layers": rows})


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "trt.listing")
