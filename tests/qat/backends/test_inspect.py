"""`qswin inspect`: of an ONNX file, a checkpoint, and what it says of other files."""

import json

from qswin.qat.checkpoint import save_checkpoint
from qswin.trt.graphs.files import read_onnx
from tests.helpers import DESCRIPTION, fails, invoke, small_swin


def test_a_graph_is_listed(graphs, tmp_path, capsys):
    assert invoke("inspect", "--model", graphs["int8"], "--json", tmp_path / "l.json") == 0
    output, result = capsys.readouterr().out, json.loads((tmp_path / "l.json").read_text())
    assert f"{len(read_onnx(graphs['int8']).graph.node)} layers" in output and "int8" in output
    assert result["kind"] == "layers"
    assert {layer["kind"] for layer in result["layers"]} >= {"QuantizeLinear", "MatMul", "Softmax"}


def test_json_goes_to_standard_output_where_that_is_asked_for(graphs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("inspect", "--model", graphs["fp32"], "--json", "-") == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.index('{\n  "kind"') :])["kind"] == "layers"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_listed_says_why(graphs, tmp_path, capsys):
    checkpoint = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, small_swin(depths=[2, 1]), DESCRIPTION)
    for arguments, message in (
        (["--model", graphs["fp32"], "--time"], "--time is for engines; qswin bench times an ONNX file"),
        (["--model", checkpoint, "--time"], "--time is for engines; qswin bench times a checkpoint"),
        (["--model", tmp_path / "a.txt"], "not a model file that qswin knows"),
        (["--model", tmp_path / "a.pt2"], "what it consists of is not known"),
        (["--model", tmp_path / "a.engine"], "no such engine"),
        (["--model", tmp_path / "a.onnx"], "no such ONNX file"),
    ):
        assert message in fails(capsys, "inspect", *arguments)
