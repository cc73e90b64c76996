"""Whether a graph is quantized or in FP16, and rewriting to FP16 for builders that take precision from the graph."""

import onnx

QDQ = ("QuantizeLinear", "DequantizeLinear")
FORMATS: dict[int, str] = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether the graph has Q/DQ nodes."""
    return any(node.op_type in QDQ for node in model.graph.node)


def level_formats(model: onnx.ModelProto) -> set[str]:
    """The number formats of the Q nodes, and of the DQ nodes of stored weights: int8, uint8, fp8, or ONNX's name.

    One without a zero point and `output_dtype` counts as INT8, which it is to TensorRT.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {node.output[0]: node.attribute[0].t.data_type for node in model.graph.node if node.op_type == "Constant"}
    found = (_level_type(node, types) for node in model.graph.node if node.op_type in QDQ)
    return {FORMATS.get(kind, onnx.TensorProto.DataType.Name(kind).lower()) for kind in found if kind is not None}


def _level_type(node: onnx.NodeProto, types: dict[str, int]) -> int | None:
    """ONNX's type of what a Q node gives, or a DQ node takes; None of a DQ node that a Q node feeds."""
    if len(node.input) > 2 and node.input[2] in types:
        return types[node.input[2]]
    if node.op_type == "DequantizeLinear":
        return types.get(node.input[0])
    written = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
    return written or onnx.TensorProto.INT8


def is_half(model: onnx.ModelProto) -> bool:
    """Whether the graph's weights are FP16."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def write_half_precision(model: onnx.ModelProto, overrides: dict[str, str]) -> onnx.ModelProto:
    """The graph in FP16 with Casts around what stays FP32: the overrides, and Q/DQ, whose scales FP16 would round.

    For strongly typed builders, which take precision from the graph. Inputs and outputs stay FP32.

    Raises:
        ValueError: an override asks for INT8, which only Q/DQ can give here.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for name, precision in overrides.items():
        if precision == "int8":
            raise ValueError(
                f"override {name}=int8: a strongly typed graph is INT8 where Q/DQ stand; put the site in the recipe"
            )
    if is_half(model):
        return model
    kept = [name for name, precision in overrides.items() if precision == "fp32"]
    blocked = [*DEFAULT_OP_BLOCK_LIST, *QDQ]
    half = onnx.ModelProto()
    half.CopyFrom(model)  # the converter works in place
    half = convert_float_to_float16(half, keep_io_types=True, op_block_list=blocked, node_block_list=kept)
    _tidy(half.graph)
    return half


def _tidy(graph: onnx.GraphProto) -> None:
    """The converter casts a tensor again for each FP32 node that reads it, under the same name, and puts Casts last."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    unique = {node.name: node for node in graph.node}
    del graph.node[:], graph.value_info[:]
    graph.node.extend(unique.values())
    OnnxModel.graph_topological_sort(graph)
