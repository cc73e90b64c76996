"""`qswin inspect` of an ONNX file, and what it says of other files."""

import json

import pytest

from qswin.trt.evaluation.evaluate import open_predictor
from qswin.trt.graphs.files import read_onnx
from tests.helpers import invoke


def test_a_graph_is_listed(graphs, tmp_path, capsys):
    assert invoke("inspect", "--model", graphs["int8"], "--json", tmp_path / "l.json") == 0
    output, layers = capsys.readouterr().out, json.loads((tmp_path / "l.json").read_text())["layers"]
    assert f"{len(read_onnx(graphs['int8']).graph.node)} layers" in output and "int8" in output
    assert {layer["kind"] for layer in layers} >= {"QuantizeLinear", "MatMul", "Softmax"}


def test_what_cannot_be_listed_says_why(graphs, tmp_path, capsys):
    for arguments, message in (
        (["--model", graphs["fp32"], "--time"], "--time is for engines"),
        (["--model", tmp_path / "a.txt"], "not an .onnx file or an engine"),
        (["--model", tmp_path / "a.engine"], "no such file"),
        (["--model", tmp_path / "a.onnx"], "no such ONNX file"),
    ):
        assert invoke("inspect", *arguments) == 2 and message in capsys.readouterr().err


def test_files_of_other_kinds_are_not_opened(tmp_path):
    with pytest.raises(ValueError, match="checkpoints need torch: qswin evaluate"):
        open_predictor(tmp_path / "a.safetensors")
