"""Layers from the inspector's JSON, in the forms that TensorRT 8.6 writes it, and from graphs."""

import json

import onnx
import pytest

from qswin.trt.engines.layers import Layer, graph_layers, layer_table, parse_layers, tensor_type


def test_types_of_the_inspectors_formats():
    words = [
        "Row major linear FP16 format",
        "Row major linear FP32",
        "Half",
        "Int8 NC/32HW32",
        "BF16 row",
        "N/A due to dynamic shapes",
    ]
    assert [tensor_type(text) for text in words] == ["fp16", "fp32", "fp16", "int8", "bf16", "unknown"]


def described(name: str, out: str, **more: str) -> dict:
    tensor = {"Name": "x", "Dimensions": [1], "Format/Datatype": out}
    return {"Name": name, "LayerType": "kernel", "Inputs": [tensor], "Outputs": [tensor], **more}


@pytest.mark.parametrize(
    ("layer", "nodes"),
    [
        (described("node_a + node_b", "Half"), {"node_a", "node_b"}),
        (described("PWN(node_a, node_b)", "Half"), {"node_a", "node_b", "PWN"}),
        (described("{ForeignNode[node_a...node_b]}", "Half"), {"node_a", "node_b", "ForeignNode"}),
        (described("fused", "Half", Metadata="[ONNX Layer: node/a]\x1e[ONNX Layer: b]"), {"node/a", "b"}),
        ("node_a", {"node_a"}),
    ],
)
def test_fused_nodes_are_found_in_names_and_metadata(layer, nodes):
    (parsed,) = parse_layers(json.dumps({"Layers": [layer], "Bindings": []}))
    assert set(parsed.nodes) == nodes


def test_a_graphs_types(graphs):
    layers = graph_layers(onnx.load(graphs["int8"]))
    kinds = {layer.kind: layer for layer in layers}
    assert kinds["QuantizeLinear"].outputs == ("int8",) and kinds["DequantizeLinear"].precisions == {"fp32"}
    assert len(layers) == len(onnx.load(graphs["int8"]).graph.node)


def test_the_table_puts_the_slowest_first():
    layers = [Layer("quick", "k", (), (), ("fp16",), 0.1), Layer("slow", "k", (), (), ("int8",), 0.5)]
    lines = layer_table(layers).splitlines()
    assert lines[0].endswith("slow") and "2 layers" in lines[3] and "0.600 ms" in lines[3]


def test_a_name_makes_no_line_of_its_own():
    table = layer_table([Layer("a\x1b[2J\nfake", "Add", (), ("fp32",), ("fp32",))])
    assert len(table.splitlines()) == 4 and r"a\x1b[2J\nfake" in table
