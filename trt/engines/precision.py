"""Precision of single layers: patterns resolved on the ONNX graph, then set as layer precisions or written as Casts."""

import contextlib
import difflib
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx

from qswin.trt.engines.version import tensorrt_module

SECONDS = 2  # for one pattern and all nodes, which takes milliseconds; some patterns never end
LAYER_PRECISIONS = ("fp32", "fp16", "int8")
# What FP16 breaks: the squares in variances (the first system put POW and REDUCE back to FP32, which opset 17 has as
# one node) and in cosine attention's norms. Of a preset's patterns, one at least must match.
NORMALIZATION = ("LayerNormalization", "Pow", "ReduceMean")
COSINE_ATTENTION = ("ReduceL2", "Abs", "ReduceMax", "ReduceSum", "ReduceSumSquare", "Sqrt", "Clip", "Expand", "Div")
PRESETS = {
    "swin-fp16": tuple(f"{kind}=fp32" for kind in NORMALIZATION),
    "swinv2-fp16": tuple(f"{kind}=fp32" for kind in (*NORMALIZATION, *COSINE_ATTENTION)),
}


def resolve_overrides(model: onnx.ModelProto, overrides: Sequence[str]) -> dict[str, str]:
    """Which nodes the overrides name.

    Args:
        overrides: "PATTERN=fp32|fp16|int8" or the name of a preset. A pattern is an operator type, or else a regular
            expression that is searched in node names. Later ones win.

    Returns:
        {node name: precision}.

    Raises:
        ValueError: an override is malformed, takes too long, or matches nothing; near names are listed.
    """
    resolved: dict[str, str] = {}
    for override in overrides:
        patterns = PRESETS.get(override, (override,))
        found: dict[str, str] = {}
        for pattern, precision in map(_parse, patterns):
            found |= dict.fromkeys(_matches(model, pattern), precision)
        if not found:
            raise ValueError(f"override {override!r} matches nothing; {_near(model, override.partition('=')[0])}")
        resolved |= found
    return resolved


def _parse(override: str) -> tuple[str, str]:
    pattern, _, precision = override.rpartition("=")
    if not pattern or precision not in LAYER_PRECISIONS:
        raise ValueError(
            f"override {override!r}: give PATTERN={'|'.join(LAYER_PRECISIONS)}, or a preset: {', '.join(PRESETS)}"
        )
    return pattern, precision


def _matches(model: onnx.ModelProto, pattern: str) -> list[str]:
    nodes = model.graph.node
    if any(node.op_type == pattern for node in nodes):
        return [node.name for node in nodes if node.op_type == pattern]
    try:
        with _time_limit(SECONDS):
            return [node.name for node in nodes if re.search(pattern, node.name)]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from error
    except TimeoutError as error:
        what = f"override {pattern!r} is not matched in {SECONDS} s"
        raise ValueError(f"{what}; leave out nested repetitions, such as (a+)+") from error


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, in the main thread; regular expressions look for signals too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _near(model: onnx.ModelProto, pattern: str) -> str:
    kinds = {node.op_type.lower(): node.op_type for node in model.graph.node}
    near = [kinds[kind] for kind in difflib.get_close_matches(pattern.lower(), kinds, n=3, cutoff=0.5)]
    near += difflib.get_close_matches(pattern, [node.name for node in model.graph.node], n=3, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else f"the operator types are {', '.join(sorted(kinds.values()))}"


def set_layer_precisions(network: Any, overrides: dict[str, str]) -> None:
    """Sets the precision and output types of the layers that the overrides name, in a weakly typed TensorRT network.

    The parser names a layer as its ONNX node. Output types are set too: a layer that computes in FP32 only to write an
    FP16 overflow would help nobody.
    """
    trt = tensorrt_module()
    types = {"fp32": trt.float32, "fp16": trt.float16, "int8": trt.int8}
    for layer in network:
        precision = overrides.get(layer.name)
        if precision is None or layer.get_output(0).dtype not in (trt.float32, trt.float16):
            continue
        layer.precision = types[precision]
        for index in range(layer.num_outputs):
            layer.set_output_type(index, types[precision])


def not_honoured(layers: Iterable[Any], overrides: dict[str, str]) -> dict[str, str]:
    """Which overrides a built engine did not keep, and what it did instead.

    Args:
        layers: the engine's, from `qswin.trt.engines.layers.engine_layers`.

    Returns:
        {node name: what it is, or why it cannot be told}.
    """
    by_node = {node: layer for layer in layers for node in layer.nodes}
    problems = {}
    for node, wanted in overrides.items():
        layer = by_node.get(node)
        if layer is None:
            problems[node] = "gone, or inside a region that the engine does not list"
        elif wanted not in layer.precisions:
            problems[node] = "/".join(sorted(layer.precisions)) or "unknown"
    return problems
