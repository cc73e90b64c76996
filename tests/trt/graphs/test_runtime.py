"""ONNX Runtime: it sends nothing of what it runs, and INT8 sums are exact on every CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qswin.calib.trt_cache.session import Session

LEVEL = 127


def product(folder: Path, rows: int, depth: int) -> np.ndarray:
    """Of two matrices of INT8's largest level, by ONNX Runtime."""
    scale, zero, weights = (
        numpy_helper.from_array(value, name)
        for name, value in (
            ("scale", np.float32(1)),
            ("zero", np.int8(0)),
            ("weights", np.full((depth, 4), LEVEL, dtype=np.int8)),
        )
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["weights", "scale", "zero"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["product"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", [rows, depth]), ("product", [rows, 4]))
    ]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], [scale, zero, weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = Session(folder / "product.onnx", model.SerializeToString())
    return session.run(["product"], np.full((rows, depth), LEVEL, dtype=np.float32))[0]


@pytest.mark.parametrize("depth", [32, 1024])
def test_int8_sums_are_exact_on_every_cpu(tmp_path, depth):
    """On one without VNNI ONNX Runtime adds pairs of products in 16 bits, where it is not asked for more."""
    assert (product(tmp_path, 2, depth) == depth * LEVEL**2).all()


def test_no_two_weights_share_a_zero_point(graphs):
    """ONNX Runtime changes them in place where it computes exactly without VNNI."""
    graph = onnx.load(graphs["int8"]).graph
    weights = {each.name for each in graph.initializer}
    own = [node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    assert len(own) > 4 and len(own) == len(set(own))


def test_onnx_runtime_keeps_nothing_to_send(graphs, tmp_path):
    """Its telemetry queues events in a database in the home folder, and sends them from there later."""
    script = f"from qswin.trt.graphs.runtime import OnnxRuntimePredictor; OnnxRuntimePredictor({str(graphs['fp32'])!r})"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", script], env={**environment, **home}, check=True)
    assert not list(tmp_path.iterdir())
