"""Engines from exported ONNX files: TensorRT on a GPU, TensorRT-RTX ahead of time without one. The command `qswin build`.

An engine is code: load only engines you built yourself.
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import onnx

from qswin.calib.files import sha256, write_atomic, write_json
from qswin.calib.trt_cache.cache_file import ALGORITHMS, parse_cache, read_cache
from qswin.calib.trt_cache.native import make_calibrator
from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.precision import not_honoured, resolve_overrides, set_layer_precisions
from qswin.trt.engines.version import Backend, find_backend
from qswin.trt.graphs.files import opset, parse_metadata, properties, read_onnx, with_batch
from qswin.trt.graphs.half_precision import is_half, is_quantized, write_half_precision

PRECISIONS = ("fp32", "tf32", "fp16", "int8", "best")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        precision: fp32, tf32, fp16, int8 (the rest in FP16), or best: all that the builder may choose from.
        target: tensorrt or tensorrt-rtx.
        profile: smallest, usual and largest batch, for a graph whose batch is free.
        overrides: see qswin.trt.engines.precision.resolve_overrides.
        calib_cache: a calibration cache, for INT8 of a graph without Q/DQ (TensorRT before 11).
        capability: TensorRT-RTX's compute capability to build for, "8.9"; TensorRT builds for the GPU that is here.
        timing_cache: a file of measured tactics, read and added to.
        workspace: bytes of GPU memory that tactics may use; None for all of it.
        level: builder optimization level, 0 to 5; None for TensorRT's default.
        fold: fold constants first (Polygraphy, ONNX-GraphSurgeon).
    """

    precision: str = "best"
    target: str = "tensorrt"
    profile: tuple[int, int, int] = (1, 8, 64)
    overrides: tuple[str, ...] = ()
    calib_cache: Path | None = None
    capability: str = "8.9"
    timing_cache: Path | None = None
    workspace: int | None = None
    level: int | None = None
    fold: bool = False


def build_engine(path: Path, options: BuildOptions) -> tuple[bytes, dict[str, Any]]:
    """Builds an engine.

    Returns:
        The serialized engine, and its sidecar but for the engine's own checksum.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the installed TensorRT has not what is asked for (the alternative is named), or cannot take the graph.
    """
    backend, model = find_backend(options.target), read_onnx(path)
    check_possible(path, model, options, backend)
    metadata = parse_metadata(path, properties(model))
    model, overrides = prepare_graph(model, options, backend)
    start = time.perf_counter()
    warm = options.timing_cache is not None and options.timing_cache.is_file()
    engine, profile = build_network(path, model, options, backend, overrides, _cached_calibrator(options))
    gpu = find_gpu()
    return engine, {
        **metadata,
        "onnx": path.name,
        "onnx_sha256": sha256(path),
        "target": backend.target,
        "version": backend.version,
        "gpu": None if gpu is None else gpu.name,
        "capability": gpu.capability if gpu and backend.can.needs_gpu else options.capability,
        "engine_precision": options.precision,
        "overrides": list(options.overrides),
        "not_honoured": _not_honoured(engine, overrides) if backend.can.weak_typing and overrides else {},
        "calib_cache_sha256": None if options.calib_cache is None else sha256(options.calib_cache),
        "profile": profile,
        "seconds": round(time.perf_counter() - start, 1),
        "warm_timing_cache": warm,
    }


def prepare_graph(model: onnx.ModelProto, options: BuildOptions, backend: Backend) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph as the builder gets it, folded and, for a strongly typed builder, with its precision written in.

    Returns:
        The graph, and which nodes the overrides name.

    Raises:
        ValueError: an override is malformed or matches nothing, or ONNX-GraphSurgeon is missing.
    """
    if options.fold:
        model = fold_constants(model)
    overrides = resolve_overrides(model, options.overrides)
    if not backend.can.weak_typing and options.precision not in ("fp32", "tf32"):
        model = write_half_precision(model, overrides)
    return model, overrides


def check_possible(
    path: Path, model: onnx.ModelProto, options: BuildOptions, backend: Backend, calibrated: bool = False
) -> None:
    """Raises ValueError when the backend, the graph and the precision do not go together; says what would.

    Args:
        calibrated: ranges come from a calibrator.
    """
    precision, quantized = options.precision, is_quantized(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; choose {', '.join(PRECISIONS)}")
    if opset(model) > backend.can.newest_opset:
        raise ValueError(
            f"{path}: opset {opset(model)}, but {backend} takes {backend.can.newest_opset} at most;"
            f" qswin export --opset {backend.can.newest_opset}"
        )
    if backend.can.needs_gpu and find_gpu() is None:
        raise ValueError(f"{backend} builds on a GPU, and there is none here; --target tensorrt-rtx builds without one")
    if options.overrides and precision in ("fp32", "tf32"):
        raise ValueError("--override is for --precision fp16, int8 or best: in fp32 and tf32 there is nothing to keep")
    if quantized and precision in ("fp32", "tf32", "fp16"):
        raise ValueError(
            f"{path}: has Q/DQ nodes, which are INT8; build it as int8 or best, or export with --precision fp32"
        )
    if is_half(model) and precision in ("fp32", "tf32"):
        raise ValueError(f"{path}: its weights are FP16; export with --precision fp32")
    if options.calib_cache is not None:
        _check_calibrated(path, options, backend, quantized)
    elif precision == "int8" and not quantized and not calibrated:
        raise ValueError(f"{path}: has no Q/DQ nodes; export with --precision int8, or give a --calib-cache")


def _check_calibrated(path: Path, options: BuildOptions, backend: Backend, quantized: bool) -> None:
    if not backend.can.implicit_int8:
        raise ValueError(f"{backend} has no implicit INT8, so no use for a calibration cache; build a Q/DQ graph instead")
    if quantized or options.precision not in ("int8", "best"):
        raise ValueError(f"{path}: a calibration cache is for --precision int8 or best of a graph without Q/DQ nodes")
    assert options.calib_cache is not None
    read_cache(options.calib_cache, backend.version, sha256(path))


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with constant subgraphs computed ahead of time. Raises ValueError where ONNX-GraphSurgeon is missing."""
    try:
        import onnx_graphsurgeon  # noqa: F401
    except ImportError as error:
        raise ValueError("--fold needs ONNX-GraphSurgeon: pip install onnx-graphsurgeon") from error
    from polygraphy.backend.onnx import fold_constants as fold

    folded = fold(model)
    del folded.metadata_props[:]
    folded.metadata_props.extend(model.metadata_props)  # ONNX-GraphSurgeon loses them
    return folded


def _cached_calibrator(options: BuildOptions) -> Any | None:
    """A calibrator that gives TensorRT what is in the cache."""
    if options.calib_cache is None:
        return None
    _, algorithm, _ = parse_cache(options.calib_cache.read_bytes(), str(options.calib_cache))
    return make_calibrator(
        next(key for key, name in ALGORITHMS.items() if name == algorithm), cache=str(options.calib_cache)
    )


def build_network(
    path: Path,
    model: onnx.ModelProto,
    options: BuildOptions,
    backend: Backend,
    overrides: dict[str, str],
    calibrator: Any | None = None,
    outputs: Collection[str] = (),
) -> tuple[bytes, tuple[int, int, int]]:
    """Builds what `check_possible` has let through.

    Args:
        outputs: tensors to give out besides the logits.

    Returns:
        The serialized engine, and the batches it takes: smallest, usual, largest.

    Raises:
        ValueError: TensorRT cannot parse or build the graph.
    """
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_bytes
    from polygraphy.exception import PolygraphyException

    low, _, high = options.profile
    if low == high:
        model = with_batch(model, low)  # a fixed batch builds sooner and runs faster
    try:
        builder, network, parser = network_from_onnx_bytes(
            model.SerializeToString(), strongly_typed=backend.target == "tensorrt" and not backend.can.weak_typing
        )
        fixed = network.get_input(0).shape[0]
        profile = options.profile if fixed == -1 else (fixed, fixed, fixed)
        if backend.can.weak_typing:
            set_layer_precisions(network, overrides)
        mark_outputs(network, outputs)
        config = _config(network, profile, options, backend, calibrator)
        engine = engine_bytes_from_network((builder, network, parser), config, save_timing_cache=_timing_cache(options))
    except PolygraphyException as error:
        raise ValueError(f"{path}: {backend} cannot build it ({error}); its log is above") from error
    return bytes(engine), profile


def mark_outputs(network: Any, names: Collection[str]) -> None:
    """Makes tensors of a TensorRT network outputs, those of the names that it has."""
    marked = {network.get_output(index).name for index in range(network.num_outputs)}
    for layer in network:
        for index in range(layer.num_outputs):
            tensor = layer.get_output(index)
            if tensor.name in names and tensor.name not in marked:
                network.mark_output(tensor)


def _timing_cache(options: BuildOptions) -> str | None:
    return None if options.timing_cache is None else str(options.timing_cache)


def _config(
    network: Any, profile: tuple[int, int, int], options: BuildOptions, backend: Backend, calibrator: Any | None
) -> Any:
    """Polygraphy's loader of the builder configuration."""
    from polygraphy.backend import trt as loaders

    image = network.get_input(0)
    shapes = ((batch, *tuple(image.shape)[1:]) for batch in profile)
    common: dict[str, Any] = {
        "profiles": [loaders.Profile().add(image.name, *shapes)],
        "profiling_verbosity": _tensorrt().ProfilingVerbosity.DETAILED,  # so that qswin inspect sees types and fusions
        "builder_optimization_level": options.level,
        "load_timing_cache": _timing_cache(options),
        "memory_pool_limits": None
        if options.workspace is None
        else {_tensorrt().MemoryPoolType.WORKSPACE: options.workspace},
    }
    if backend.target == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        loader = CreateConfigRTX(compute_capabilities=[_capability(options.capability, backend)], **common)
        return with_tf32(loader, options.precision in ("tf32", "best"))
    # cuBLAS and cuDNN have been off by default since TensorRT 10: an engine that uses neither needs neither installed.
    sources = [getattr(_tensorrt().TacticSource, name) for name in ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")]
    precision, weak = options.precision, backend.can.weak_typing
    return loaders.CreateConfig(
        tf32=precision in ("tf32", "best"),
        fp16=weak and precision in ("fp16", "int8", "best"),
        int8=weak and (precision == "int8" or (precision == "best" and (calibrator is not None or _has_scales(network)))),
        calibrator=calibrator,
        precision_constraints="prefer" if weak and options.overrides else None,
        tactic_sources=sources,
        **common,
    )


def with_tf32(loader: Callable[[Any, Any], Any], tf32: bool) -> Callable[[Any, Any], Any]:
    """A loader that also switches TF32 on or off: TensorRT-RTX has it on by default, and Polygraphy leaves it so there."""

    def create(builder: Any, network: Any) -> Any:
        config, flag = loader(builder, network), _tensorrt().BuilderFlag.TF32
        config.set_flag(flag) if tf32 else config.clear_flag(flag)
        return config

    return create


def _has_scales(network: Any) -> bool:
    return any(layer.type == _tensorrt().LayerType.QUANTIZE for layer in network)


def _tensorrt() -> Any:
    """The module that Polygraphy uses, tensorrt or tensorrt_rtx."""
    from polygraphy.mod.trt_importer import lazy_import_trt

    return lazy_import_trt()


def _capability(text: str, backend: Backend) -> tuple[int, int]:
    """(8, 9) of "8.9". Raises ValueError, with those that there are, for one that TensorRT-RTX does not build for."""
    names = [name for name in _tensorrt().ComputeCapability.__members__ if name.startswith("SM")]
    known = [f"{name[2:-1]}.{name[-1]}" for name in names]
    if text not in known:
        raise ValueError(f"compute capability {text}: {backend} builds for {', '.join(known)}; --target tensorrt for others")
    major, minor = text.split(".")
    return int(major), int(minor)


def _not_honoured(engine: bytes, overrides: dict[str, str]) -> dict[str, str]:
    from polygraphy.backend.trt import engine_from_bytes

    from qswin.trt.engines.layers import engine_layers

    return not_honoured(engine_layers(engine_from_bytes(engine)), overrides)


def save_engine(path: Path, engine: bytes, sidecar: dict[str, Any]) -> None:
    """Writes an engine and its sidecar, each atomically; the sidecar, with the engine's checksum, last."""
    write_atomic(path, engine)
    write_json(path.with_suffix(".json"), {**sidecar, "sha256": sha256(path)})


def parse_profile(text: str) -> tuple[int, int, int]:
    """(1, 16, 64) of "1,16,64"; one number stands for all three. Raises ValueError for anything else."""
    try:
        batches = [int(batch) for batch in text.split(",")]
    except ValueError:
        batches = []
    low, usual, high = batches * 3 if len(batches) == 1 else batches if len(batches) == 3 else (0, 0, 0)
    if not 0 < low <= usual <= high:
        raise ValueError(f"--shapes {text}: give the smallest, usual and largest batch in order, for instance 1,16,64")
    return low, usual, high


def parse_bytes(text: str) -> int:
    """Bytes of "4GiB", "512MiB" or a plain number. Raises ValueError for anything else."""
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdecimal() or unit not in UNITS:
        raise ValueError(f"{text!r} is no size; write 4GiB, 512MiB or a number of bytes")
    return int(number) * UNITS[unit]
