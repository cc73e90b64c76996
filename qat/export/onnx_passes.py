"""What is done to an exported ONNX graph: weights laid out and quantized ahead of time, and opset 17."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qswin.calib.grid import FP8, INT8, Grid

STORED = {grid.onnx_type: grid for grid in (INT8, FP8)}  # formats of weights, by their type in ONNX


def finish_weights(model: ir.Model, store: bool) -> None:
    """Transposes quantized weights ahead of time and, with `store`, stores their levels.

    The exporter leaves weight -> Q -> DQ -> Transpose -> MatMul. Then the weight is stored transposed with its scales
    along axis 1, so that DQ feeds MatMul itself, as fusions to INT8 kernels want it; with `store` Q is computed here,
    by QuantizeLinear's definition: saturate(round_half_even(x / scale)). A Q to a type that is not `STORED` is left to
    the runtime. Each weight gets a zero point of its own: ONNX Runtime, asked to compute exactly on CPUs without VNNI
    (session.x64quantprecision), changes the zero points of weights in place and fails where two share one.
    """
    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        weight = quantize.inputs[0]
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        dequantize, zero_point = quantize.outputs[0].consumers()[0], quantize.inputs[2]
        _transpose_ahead(model.graph, weight, quantize, dequantize)
        if zero_point is not None:
            own = _constant(model.graph, f"{weight.name}_zero_point", _array(zero_point))
            dequantize.replace_input_with(2, own)
        grid = None if zero_point is None else STORED.get(str(zero_point.dtype))
        if store and grid is not None:
            _quantize_ahead(model.graph, weight, quantize, grid)


def _transpose_ahead(graph: ir.Graph, weight: ir.Value, quantize: ir.Node, dequantize: ir.Node) -> None:
    consumers = dequantize.outputs[0].consumers()
    if len(consumers) != 1 or consumers[0].op_type != "Transpose":
        return
    _store(weight, _array(weight).T)
    for node in (quantize, dequantize):
        if "axis" in node.attributes:
            node.attributes["axis"] = ir.AttrInt64("axis", 1 - node.attributes["axis"].as_int())
        node.outputs[0].shape = weight.shape
    consumers[0].outputs[0].replace_all_uses_with(dequantize.outputs[0])
    graph.remove(consumers[0], safe=True)


def _quantize_ahead(graph: ir.Graph, weight: ir.Value, quantize: ir.Node, grid: Grid) -> None:
    values, scale = _array(weight), _array(quantize.inputs[1])
    if "axis" in quantize.attributes:
        scale = np.expand_dims(scale, [d for d in range(values.ndim) if d != quantize.attributes["axis"].as_int()])
    _store(weight, grid.codes(values / scale))
    quantize.outputs[0].replace_all_uses_with(weight)
    graph.remove(quantize, safe=True)


def _array(value: Any) -> np.ndarray:
    return value.const_value.numpy()


def _store(value: Any, array: np.ndarray) -> None:
    """Gives an initializer another array, and the type and shape that go with it."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.const_value, value.dtype, value.shape = tensor, tensor.dtype, tensor.shape


def lower_to_opset_17(model: ir.Model) -> None:
    """Turns an opset 18 graph into opset 17, TensorRT 8.6's newest.

    Opset 18 changed two kinds of operators in these graphs: the axes of reductions (average pooling, the norms of
    cosine attention) became an input, and Split (CvT's class token) got an attribute. Every other node must mean the
    same in both, which is checked against ONNX's own schemas.

    Raises:
        ValueError: a node has no form in opset 17; it is named.
    """
    slice_shapes(model.graph)
    for node in model.graph:
        # ReduceSum has had its axes as an input since opset 13.
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.inputs) == 2:
            node.attributes["axes"] = ir.AttrInt64s("axes", _array(node.inputs[1]).tolist())
            node.attributes.pop("noop_with_empty_axes", None)
            node.resize_inputs(1)
        elif node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)  # new in 18, and said by the sizes already
        elif onnx.defs.get_schema(node.op_type, 18).since_version > 17:
            raise ValueError(f"{node.name}: {node.op_type} has no form in opset 17; export with --opset 18 or newer")
        node.version = None
    model.graph.opset_imports[""] = 17


def slice_shapes(graph: ir.Graph) -> None:
    """Writes Shape of some dimensions as Shape of all and Slice: TensorRT 8.6 ignores `start` and `end`, new in 15."""
    for node in [node for node in graph if node.op_type == "Shape" and {"start", "end"} & set(node.attributes)]:
        start, end = (node.attributes.pop(name, None) for name in ("start", "end"))
        bounds = (0 if start is None else start.as_int(), np.iinfo(np.int32).max if end is None else end.as_int())
        part = node.outputs[0]
        inputs = [
            _constant(graph, f"{part.name}_{name}", np.array([value], dtype=np.int64))
            for name, value in zip(("from", "to"), bounds, strict=True)
        ]
        whole = ir.Node("", "Shape", node.inputs, num_outputs=1)
        piece = ir.Node("", "Slice", [whole.outputs[0], *inputs], num_outputs=1)
        graph.insert_before(node, [whole, piece])
        part.replace_all_uses_with(piece.outputs[0])
        graph.remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    constant = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(constant)
    return constant
