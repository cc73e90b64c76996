"""Engines built ahead of time with TensorRT-RTX, which needs no GPU for it. The command `qswin build`.

An engine is code: load only engines you built yourself.
"""

import argparse
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import logging

from calib.files import sha256, write_atomic, write_json
from trt.onnx_runtime import OnnxRuntimePredictor


def import_tensorrt_rtx() -> ModuleType:
    """TensorRT-RTX's Python bindings. Raises ValueError, with the command that installs them, where they are missing."""
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise ValueError(
            "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
        ) from error
    return tensorrt_rtx_bindings


def build_engine(onnx: Path, capability: str = "SM89", shapes: tuple[int, int, int] = (1, 8, 64)) -> bytes:
    """Builds an engine for a GPU that need not be there; precisions are those written in the ONNX graph.

    Args:
        capability: a name of TensorRT-RTX's ComputeCapability, SM75 to SM121.
        shapes: smallest, usual and largest batch, for a graph whose batch is free.

    Raises:
        ValueError: TensorRT-RTX is not installed, does not know the capability, or cannot take the graph.
    """
    trt = import_tensorrt_rtx()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx.read_bytes()):
        raise ValueError(f"{onnx}: TensorRT-RTX cannot parse it: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(_capability(trt, capability), 0)
    _add_profile(builder, network, config, shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"{onnx}: TensorRT-RTX {trt.__version__} cannot build it for {capability}; its log is above")
    return bytes(engine)


def _capability(trt: ModuleType, name: str) -> Any:
    known = {key: value for key, value in trt.ComputeCapability.__members__.items() if key.startswith("SM")}
    if name not in known:
        raise ValueError(f"compute capability {name!r}: TensorRT-RTX {trt.__version__} builds for {', '.join(known)}")
    return known[name]


def _add_profile(builder: Any, network: Any, config: Any, shapes: tuple[int, int, int]) -> None:
    image = network.get_input(0)
    if image.shape[0] != -1:
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, *((batch, *image.shape[1:]) for batch in shapes))
    config.add_optimization_profile(profile)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Builds a TensorRT-RTX engine from an exported ONNX file, without a GPU."
    parser.epilog = "example:\n  qswin build --onnx runs/x/int8.onnx --engine runs/x/int8.engine --capability SM89"
    parser.add_argument("--onnx", required=True, type=Path)
    parser.add_argument("--engine", required=True, type=Path, help="the file to write; its sidecar goes beside it")
    parser.add_argument("--capability", default="SM89", help="of the GPU it is for: SM75 ... SM121")
    parser.add_argument("--shapes", default="1,8,64", help="smallest, usual and largest batch")


def main(args: argparse.Namespace) -> None:
    try:
        low, usual, high = (int(batch) for batch in args.shapes.split(","))
    except ValueError as error:
        raise ValueError(f"--shapes {args.shapes}: give three batch sizes, for instance 1,8,64") from error
    metadata = OnnxRuntimePredictor(args.onnx).metadata
    start = time.perf_counter()
    engine = build_engine(args.onnx, args.capability, (low, usual, high))
    write_atomic(args.engine, engine)
    sidecar = {"onnx_sha256": sha256(args.onnx), "tensorrt_rtx": import_tensorrt_rtx().__version__}
    write_json(args.engine.with_suffix(".json"), {**metadata, **sidecar, "capability": args.capability})
    seconds = time.perf_counter() - start
    logging.info("%s: %.1f MB in %.1f s", args.engine, len(engine) / 1e6, seconds)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "trt.build")
