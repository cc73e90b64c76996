"""Engines from exported ONNX files: TensorRT on a GPU, TensorRT-RTX ahead of time without one.

An engine is code: load only engines you built yourself.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import onnx

from qswin.calib.trt_cache.cache_file import ALGORITHMS, parse_cache, read_cache
from qswin.calib.trt_cache.native import make_calibrator
from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.layers import engine_layers
from qswin.trt.engines.network import DEFAULT_CAPABILITY, build_network
from qswin.trt.engines.options import BuildOptions, check_possible
from qswin.trt.engines.precision import not_honoured, resolve_overrides
from qswin.trt.engines.version import TensorRT, find_tensorrt
from qswin.trt.graphs.files import check_interface, metadata_values, open_onnx, parse_metadata, properties
from qswin.trt.graphs.half_precision import write_half_precision


def check_size(path: Path, model: onnx.ModelProto) -> None:
    """Raises ValueError for a graph whose images may have any height and width."""
    if any(dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]):
        raise ValueError(f"{path}: takes images of any size, an engine those of one; export it with --sizes HxW")


def build_engine(path: Path, options: BuildOptions) -> tuple[bytes, dict[str, Any]]:
    """Builds an engine from an ONNX file. It and the cache are read once: the sidecar's checksums are of what is built.

    Returns:
        The serialized engine, and what its sidecar says of it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the installed TensorRT lacks what is asked for (the alternative is named), or cannot take the graph.
    """
    tensorrt, (model, digest) = find_tensorrt(options.target), open_onnx(path)
    check_possible(path, model, options, tensorrt)
    check_interface(path, model)
    check_size(path, model)
    parse_metadata(path, properties(model))  # what an engine could not be run with is not built
    cache = None if options.calib_cache is None else read_cache(options.calib_cache, tensorrt.version, digest)
    model, overrides = prepare_graph(model, options, tensorrt)
    start = time.perf_counter()
    warm = options.timing_cache is not None and options.timing_cache.is_file()
    engine, profile = build_network(path, model, options, tensorrt, overrides, cache and _cached_calibrator(cache))
    gpu = find_gpu()
    built_for = gpu.capability if gpu and tensorrt.can.needs_gpu else options.capability or DEFAULT_CAPABILITY
    return engine, {
        **metadata_values(path, properties(model)),
        "onnx": path.name,
        "onnx_sha256": digest,
        "target": tensorrt.target,
        "version": tensorrt.version,
        "gpu": None if gpu is None else gpu.name,
        "capability": built_for,
        "engine_precision": options.precision,
        "overrides": list(options.override),
        "not_honoured": _not_honoured(engine, overrides) if tensorrt.can.weak_typing and overrides else {},
        "calib_cache_sha256": cache and hashlib.sha256(cache).hexdigest(),
        "profile": profile,
        "seconds": round(time.perf_counter() - start, 1),
        "warm_timing_cache": warm,
    }


def prepare_graph(
    model: onnx.ModelProto, options: BuildOptions, tensorrt: TensorRT
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph as the builder gets it, folded and, for a strongly typed builder, with its precision written in.

    Returns:
        The graph, and {node: precision} of the overrides.

    Raises:
        ValueError: an override is malformed or matches nothing, or ONNX-GraphSurgeon is missing.
    """
    if options.fold:
        model = fold_constants(model)
    overrides = resolve_overrides(model, options.override)
    if not tensorrt.can.weak_typing and options.precision not in ("fp32", "tf32"):
        model = write_half_precision(model, overrides)
    return model, overrides


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with constant subgraphs computed ahead of time. Raises ValueError without ONNX-GraphSurgeon."""
    try:
        import onnx_graphsurgeon  # noqa: F401
    except ImportError as error:
        raise ValueError("--fold needs ONNX-GraphSurgeon: pip install onnx-graphsurgeon") from error
    from polygraphy.backend.onnx import fold_constants as fold

    folded = fold(model)
    del folded.metadata_props[:]
    folded.metadata_props.extend(model.metadata_props)  # ONNX-GraphSurgeon loses them
    return folded


def _cached_calibrator(cache: bytes) -> Any:
    """A calibrator that gives TensorRT what is in the cache."""
    _, algorithm, _ = parse_cache(cache)
    return make_calibrator(next(key for key, name in ALGORITHMS.items() if name == algorithm), cache=cache)


def _not_honoured(engine: bytes, overrides: dict[str, str]) -> dict[str, str]:
    from polygraphy.backend.trt import engine_from_bytes

    return not_honoured(engine_layers(engine_from_bytes(engine)), overrides)
