"""ONNX Runtime: a run that does not end is stopped, and INT8 sums that are wrong on this CPU are found out."""

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from absl import logging
from onnx import TensorProto, helper, numpy_helper

from qswin.trt.graphs import runtime
from qswin.trt.graphs.runtime import OnnxRuntimePredictor, int8_sums_saturate


def test_sums_saturate_on_x86_without_vnni():
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file():
        pytest.skip("the CPU's instructions are not known")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert int8_sums_saturate() is ("vnni" not in flags)


@pytest.mark.parametrize(("graph", "saturates", "warnings"), [("int8", True, 1), ("int8", False, 0), ("fp32", True, 0)])
def test_int8_graphs_warn_where_sums_saturate(graphs, monkeypatch, graph, saturates, warnings):
    said = []
    monkeypatch.setattr(runtime, "int8_sums_saturate", lambda: saturates)
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    OnnxRuntimePredictor(graphs[graph])
    assert len(said) == warnings and all("lacks VNNI" in line for line in said)


def test_a_run_that_does_not_end_is_stopped(graphs, tmp_path):
    """A Loop of 2 ** 62 rounds over the input; the next image would be right again."""
    graph = onnx.load(graphs["fp32"])
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)]
    outputs = [value("still", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)]
    nodes = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Neg", ["x"], ["y"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    rounds = numpy_helper.from_array(np.array(2**62), "rounds")
    graph.graph.initializer.extend([rounds, numpy_helper.from_array(np.array(True), "true")])
    for node in graph.graph.node:
        node.input[:] = ["turned" if name == "input" else name for name in node.input]
    graph.graph.node.insert(0, helper.make_node("Loop", ["rounds", "true", "input"], ["turned"], body=body))
    onnx.save(graph, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"x\.onnx: a run took longer than 0\.5 s"):
        OnnxRuntimePredictor(tmp_path / "x.onnx", timeout=0.5)(np.zeros((1, 3, 32, 32), np.float32))
    limited = OnnxRuntimePredictor(graphs["fp32"], timeout=60)
    images = np.ones((2, 3, 32, 32), np.float32)
    assert np.array_equal(limited(images), OnnxRuntimePredictor(graphs["fp32"])(images))
