"""Overrides resolved on real graphs, and FP16 written into graphs, judged by ONNX Runtime."""

import signal

import numpy as np
import onnx
import onnxruntime
import pytest

from qswin.trt.engines import precision
from qswin.trt.engines.layers import Layer, graph_layers
from qswin.trt.engines.precision import not_honoured, resolve_overrides
from qswin.trt.graphs.half_precision import is_half, is_quantized, write_half_precision


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]


def names(model: onnx.ModelProto, kind: str) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == kind]


def test_operator_types_patterns_and_presets(graphs):
    model = onnx.load(graphs["fp32"])
    norms, softmaxes = names(model, "LayerNormalization"), names(model, "Softmax")
    assert resolve_overrides(model, ["LayerNormalization=fp32"]) == dict.fromkeys(norms, "fp32")
    assert resolve_overrides(model, ["swin-fp16"]).items() >= dict.fromkeys(norms, "fp32").items()
    assert resolve_overrides(model, [f"^{softmaxes[0]}$=fp16"]) == {softmaxes[0]: "fp16"}
    later = resolve_overrides(model, ["Softmax=fp32", f"^{softmaxes[0]}$=fp16"])
    assert later == {**dict.fromkeys(softmaxes, "fp32"), softmaxes[0]: "fp16"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Layernorm=fp32", "matches nothing; near names: LayerNormalization"),
        ("Softmax=fp64", "give PATTERN=fp32|fp16|int8, or a preset: swin-fp16"),
        ("swin-fp17", "or a preset"),
        ("(=fp32", "is not a regular expression"),
    ],
)
def test_wrong_overrides_say_what_would_be_right(graphs, override, message):
    with pytest.raises(ValueError) as error:
        resolve_overrides(onnx.load(graphs["fp32"]), [override])
    assert message in str(error.value)


def test_kinds_of_graphs(graphs):
    kinds = {
        name: (is_quantized(onnx.load(graphs[name])), is_half(onnx.load(graphs[name])))
        for name in ("fp32", "fp16", "int8")
    }
    assert kinds == {"fp32": (False, False), "fp16": (False, True), "int8": (True, False)}


def test_half_precision_computes_the_same_to_fp16(graphs, images):
    """And in FP16: with the exact same result it would have done nothing."""
    model = onnx.load(graphs["fp32"])
    expected = run(model, images)
    half = write_half_precision(model, {})
    assert not is_half(model)
    error = np.abs(run(half, images) - expected).max()
    assert is_half(half) and 0 < error < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["int8", "int8-scaled"])
def test_overrides_and_qdq_stay_in_float(graphs, images, kind):
    overrides = resolve_overrides(onnx.load(graphs[kind]), ["LayerNormalization=fp32"])
    half = write_half_precision(onnx.load(graphs[kind]), overrides)
    by_name = {layer.name: layer for layer in graph_layers(half)}
    assert all(by_name[name].outputs == ("fp32",) for name in overrides)
    assert all(by_name[name].inputs[0] == "fp32" for name in names(half, "QuantizeLinear"))
    assert any(by_name[name].outputs == ("fp16",) for name in names(half, "MatMul"))
    expected = run(onnx.load(graphs[kind]), images)
    assert np.abs(run(half, images) - expected).max() < 0.1 * np.abs(expected).max()


def test_int8_cannot_be_written_by_casts(graphs):
    model = onnx.load(graphs["fp32"])
    with pytest.raises(ValueError, match="INT8 where Q/DQ stand"):
        write_half_precision(model, resolve_overrides(model, ["Softmax=int8"]))


def test_what_an_engine_did_with_overrides():
    layers = [
        Layer("a + b", "Kernel", ("a", "b"), ("fp16",), ("fp32",)),
        Layer("c", "Kernel", ("c",), ("fp16",), ("fp16",)),
    ]
    problems = not_honoured(layers, {"a": "fp32", "c": "fp32", "d": "fp32"})
    assert set(problems) == {"c", "d"} and problems["c"] == "fp16" and "does not list" in problems["d"]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*a){20}$"])
def test_a_pattern_that_never_ends_is_refused(monkeypatch, pattern):
    monkeypatch.setattr(precision, "SECONDS", 0.2)
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"], name="a" * 60 + "!")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(ValueError, match="is not matched in 0.2 s; leave out nested repetitions"):
        resolve_overrides(model, [f"{pattern}=fp32"])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
