"""From an ONNX graph to a serialized engine: TensorRT's network, builder configuration and build, with Polygraphy."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import onnx

from qswin.trt.engines.options import BuildOptions
from qswin.trt.engines.precision import set_layer_precisions
from qswin.trt.engines.version import TensorRT, tensorrt_module
from qswin.trt.graphs.files import with_batch
from qswin.trt.graphs.half_precision import level_formats

DEFAULT_CAPABILITY = "8.9"  # of TensorRT-RTX's engines


def build_network(
    path: Path,
    model: onnx.ModelProto,
    options: BuildOptions,
    tensorrt: TensorRT,
    overrides: dict[str, str],
    calibrator: Any | None = None,
    outputs: Collection[str] = (),
) -> tuple[bytes, tuple[int, int, int]]:
    """Builds what `qswin.trt.engines.options.check_possible` has let through.

    Args:
        overrides: {node: precision}.
        outputs: tensors to give out besides the logits.

    Returns:
        The serialized engine, and the batches it takes: smallest, usual, largest.

    Raises:
        ValueError: TensorRT cannot parse or build the graph.
    """
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_bytes
    from polygraphy.exception import PolygraphyException

    low, _, high = options.batch_sizes
    if low == high:
        model = with_batch(model, low)  # a fixed batch builds sooner and runs faster
    try:
        builder, network, parser = network_from_onnx_bytes(
            model.SerializeToString(), strongly_typed=tensorrt.target == "tensorrt" and not tensorrt.can.weak_typing
        )
        fixed = network.get_input(0).shape[0]
        profile = options.batch_sizes if fixed == -1 else (fixed, fixed, fixed)
        if tensorrt.can.weak_typing:
            set_layer_precisions(network, overrides)
        mark_outputs(network, outputs)
        config = builder_config(network, profile, options, tensorrt, calibrator, level_formats(model))
        engine = engine_bytes_from_network((builder, network, parser), config, save_timing_cache=_timing_cache(options))
    except PolygraphyException as error:
        raise ValueError(f"{path}: {tensorrt} cannot build it ({error}); its log is above") from error
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


def builder_config(
    network: Any,
    profile: tuple[int, int, int],
    options: BuildOptions,
    tensorrt: TensorRT,
    calibrator: Any | None,
    levels: Collection[str],
) -> Any:
    """Polygraphy's loader of the builder configuration; `levels` are the number formats of the graph's Q/DQ."""
    from polygraphy.backend import trt as loaders

    trt, image = tensorrt_module(), network.get_input(0)
    shapes = ((batch, *tuple(image.shape)[1:]) for batch in profile)
    pools = None if options.workspace is None else {trt.MemoryPoolType.WORKSPACE: options.workspace}
    common: dict[str, Any] = {
        "profiles": [loaders.Profile().add(image.name, *shapes)],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # so that qswin inspect sees types and fusions
        "builder_optimization_level": options.level,
        "load_timing_cache": _timing_cache(options),
        "memory_pool_limits": pools,
    }
    if tensorrt.target == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capability = _capability(options.capability or DEFAULT_CAPABILITY, tensorrt)
        loader = CreateConfigRTX(compute_capabilities=[capability], **common)
        return with_tf32(loader, options.precision in ("tf32", "best"))
    precision, weak = options.precision, tensorrt.can.weak_typing
    return loaders.CreateConfig(
        tf32=precision in ("tf32", "best"),
        fp16=weak and precision in ("fp16", "int8", "fp8", "best"),
        fp8=weak and "fp8" in levels,
        int8=weak and (precision == "int8" or "int8" in levels or (precision == "best" and calibrator is not None)),
        calibrator=calibrator,
        precision_constraints="prefer" if weak and options.override else None,
        # Without cuBLAS and cuDNN, off by default since TensorRT 10: an engine without them needs neither installed.
        tactic_sources=[trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS],
        **common,
    )


def with_tf32(loader: Callable[[Any, Any], Any], tf32: bool) -> Callable[[Any, Any], Any]:
    """A loader that also switches TF32 on or off: TensorRT-RTX has it on by default, and Polygraphy leaves it so."""

    def create(builder: Any, network: Any) -> Any:
        config, flag = loader(builder, network), tensorrt_module().BuilderFlag.TF32
        config.set_flag(flag) if tf32 else config.clear_flag(flag)
        return config

    return create


def _capability(text: str, tensorrt: TensorRT) -> tuple[int, int]:
    """(8, 9) of "8.9". Raises ValueError, with those that there are, for one that TensorRT-RTX does not build for."""
    names = [name for name in tensorrt_module().ComputeCapability.__members__ if name.startswith("SM")]
    known = [f"{name[2:-1]}.{name[-1]}" for name in names]
    if text not in known:
        raise ValueError(
            f"compute capability {text}: {tensorrt} builds for {', '.join(known)}; --target tensorrt for others"
        )
    major, minor = text.split(".")
    return int(major), int(minor)
