"""Which number formats the Q/DQ nodes of a graph have."""

import onnx
import pytest

from qswin.trt.graphs.half_precision import level_formats


def pair(zero_point=None, **attributes):
    """A graph of one Q and one DQ node."""
    inputs = ["x", "scale"] + (["zero"] if zero_point is not None else [])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", inputs, ["q"], **attributes),
        onnx.helper.make_node("DequantizeLinear", ["q", *inputs[1:]], ["y"]),
    ]
    constants = [onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0])]
    if zero_point is not None:
        constants.append(onnx.helper.make_tensor("zero", zero_point, [], [0]))
    tensors = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "pair", tensors[:1], tensors[1:], constants))


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (pair(onnx.TensorProto.INT8), {"int8"}),
        (pair(onnx.TensorProto.UINT8), {"uint8"}),
        (pair(onnx.TensorProto.FLOAT8E4M3FN), {"fp8"}),
        (pair(onnx.TensorProto.FLOAT8E5M2), {"float8e5m2"}),
        (pair(), {"int8"}),
        (pair(output_dtype=onnx.TensorProto.FLOAT8E4M3FN), {"fp8"}),
    ],
)
def test_formats_of_levels(graph, expected):
    assert level_formats(graph) == expected
