"""ONNX files that qswin did not write: one line, exit code 2."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qswin.trt.engines.calibrate import CacheOptions, make_cache
from tests.helpers import DESCRIPTION, fails, invoke

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def tensor(name, kind=FLOAT, shape=("N", 3, 32, 32)):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(inputs, outputs, initializers=(), node=("Identity", "input")):
    operator, source = node
    nodes = [helper.make_node(operator, [source], ["logits"], name="a")]
    return helper.make_graph(nodes, "hostile", inputs, outputs, list(initializers))


SEQUENCE = helper.make_tensor_sequence_value_info("input", FLOAT, None)
WEIGHT = numpy_helper.from_array(np.zeros((1, 5), np.float32), "weight")
GRAPHS = {
    "no inputs": (graph([], [tensor("logits", shape=(1, 5))], [WEIGHT], ("Identity", "weight")), "its input should be"),
    "float16": (graph([tensor("input", HALF)], [tensor("logits", HALF)]), "its input is tensor_type FLOAT16"),
    "scalar": (graph([tensor("input", shape=())], [tensor("logits", shape=())]), "FLOAT, of 0 dimensions"),
    "sequence": (graph([SEQUENCE], [tensor("logits")]), "its input is sequence_type"),
    "another name": (graph([tensor("image")], [tensor("logits")], (), ("Identity", "image")), "its input should be"),
    "no shape": (graph([tensor("input", shape=None)], [tensor("logits")]), "FLOAT, of 0 dimensions"),
}


def save(path, graph, metadata=None):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"qswin": json.dumps(metadata or DESCRIPTION.to_dict())})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs_of_another_interface_are_refused(tmp_path, capsys, data, case):
    hostile, words = GRAPHS[case]
    path = save(tmp_path / "a.onnx", hostile)
    line = fails(capsys, "evaluate", "--model", path, "--data", data / "val", "--workers", 0)
    assert words in line and "a.onnx" in line
    with pytest.raises(ValueError, match=r"a\.onnx: its (input|logits) "):
        make_cache(path, data / "val", tmp_path / "a.cache", CacheOptions(offline_for="8.6.0"))


def test_a_graph_of_1_tb_is_not_read(tmp_path, capsys, data):
    with (path := tmp_path / "a.onnx").open("wb") as file:
        file.truncate(1 << 40)
    assert "a.onnx: larger than 2048 MiB" in fails(capsys, "evaluate", "--model", path, "--data", data / "val")


def test_a_graph_of_another_interface_can_be_inspected(tmp_path, capsys):
    for case, (hostile, _) in GRAPHS.items():
        assert invoke("inspect", "--model", save(tmp_path / "a.onnx", hostile)) == 0, case


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize("place", ["/etc/passwd", "../secret", "weights.bin"])
def test_tensors_in_other_files_are_not_read(tmp_path, capsys, data, command, place):
    outside = TensorProto(name="weight", data_type=FLOAT, dims=[1, 5], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value=place)
    path = save(tmp_path / "a.onnx", graph([tensor("input")], [tensor("logits")], [outside]))
    (tmp_path / "weights.bin").write_bytes(bytes(20))
    rest = () if command == "inspect" else ("--data", data / "val")
    assert "a.onnx: keeps 'weight' in another file, which is not read" in fails(capsys, command, "--model", path, *rest)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": 3}, "its qswin metadata: task is 3"),
        ({"preprocessing": {"std": [0, 1, 1]}}, r"preprocessing.std[0] is 0: expected float > 0"),
        ({"preprocessing": {"size": [10**9, 10**9]}}, "preprocessing.size[0] is 1000000000: expected int <= 4096"),
        ({"classes": {}}, "classes is {}: expected array"),
        ({"precision": []}, "precision is []: expected str"),
    ],
)
def test_metadata_of_other_types_are_refused_by_key_and_value(tmp_path, capsys, data, changes, words):
    path = save(tmp_path / "a.onnx", graph([tensor("input")], [tensor("logits")]), DESCRIPTION.to_dict() | changes)
    assert words in fails(capsys, "evaluate", "--model", path, "--data", data / "val")
