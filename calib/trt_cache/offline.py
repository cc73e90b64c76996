"""Calibration ranges of an ONNX graph's tensors without a GPU: ONNX Runtime's activations, our calibrators."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx

from qswin.calib.calibrators import Histogram, find_range
from qswin.calib.trt_cache.session import Session

CALIBRATORS = {"entropy2": "entropy", "minmax": "max"}
# These only move values, so their output has their input's range: nothing is observed twice.
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


def activation_ranges(
    path: str | Path,
    model: onnx.ModelProto,
    batches: Iterable[np.ndarray],
    algorithm: str,
    threads: int = 0,
    timeout: float | None = None,
) -> dict[str, float]:
    """Runs an FP32 graph and calibrates every floating-point activation, the input included.

    Args:
        path: the graph's file, which messages name.
        batches: (N, 3, H, W) float32 each.
        algorithm: entropy2 or minmax.
        threads: of ONNX Runtime; 0 for all cores.
        timeout: seconds that a run may take; None for any number.

    Returns:
        {tensor: amax}, tensors that were 0 throughout left out.

    Raises:
        ValueError: there were no images, an activation, which is named, is NaN or infinite, or the graph does not run.
    """
    sources = value_sources(model)
    observed = sorted(set(sources.values()) - {"input"})
    session = _session(path, model, observed, threads, timeout)
    histograms = {name: Histogram() for name in ("input", *observed)}
    with ThreadPoolExecutor() as pool:
        for batch in batches:
            values = {"input": batch, **dict(zip(observed, session.run(observed, batch), strict=True))}
            list(pool.map(lambda item: _observe(histograms, *item), values.items()))
    if histograms["input"].amax == 0:
        raise ValueError("calibration saw 0 images; raise --images or check --data")
    ranges = {name: find_range(histogram, CALIBRATORS[algorithm]) for name, histogram in histograms.items()}
    return {name: ranges[source] for name, source in sources.items() if ranges[source] > 0}


def _observe(histograms: dict[str, Histogram], name: str, values: np.ndarray) -> None:
    try:
        histograms[name].add(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def value_sources(model: onnx.ModelProto) -> dict[str, str]:
    """{float32 activation: the activation whose values it has}, in the graph's order; most have their own."""
    inferred = onnx.shape_inference.infer_shapes(model)
    floating = {
        value.name
        for value in (*inferred.graph.value_info, *inferred.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    sources = {"input": "input"}
    for node in model.graph.node:
        for output in node.output:
            if output in floating:
                moved = node.op_type in MOVES and node.input[0] in sources
                sources[output] = sources[node.input[0]] if moved else output
    return sources


def activations(
    path: str | Path, model: onnx.ModelProto, names: list[str], images: np.ndarray, timeout: float | None = None
) -> dict[str, np.ndarray]:
    """{tensor: its values} for images (N, 3, H, W), in ONNX Runtime with nothing fused. Raises as `Session` does."""
    return dict(zip(names, _session(path, model, names, 0, timeout).run(names, images), strict=True))


def _session(
    path: str | Path, model: onnx.ModelProto, outputs: list[str], threads: int, timeout: float | None
) -> Session:
    """A session that gives every tensor in `outputs`, with nothing fused away."""
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    known = {value.name for value in widened.graph.output}
    widened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    return Session(path, widened.SerializeToString(), timeout, threads, fuse=False)
