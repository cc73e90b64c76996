"""What the report says first: findings in sentences, and the models of a run in one table."""

import pytest

from qswin.trt.report.summary import summary
from tests.trt.report.test_report import Page


def evaluated(model, precision, acc1, backend="onnxruntime 1.32.0"):
    values = {"model": model, "precision": precision, "backend": backend, "acc1": acc1, "acc1_error": 1.0}
    return {"kind": "evaluation", "images": 450, **values}


def timed(*rows):
    names = ("model", "backend", "precision", "batch", "ms")
    return {"kind": "timing", "rows": [dict(zip(names, row, strict=True)) for row in rows]}


RESULTS = {
    "evaluation": {
        "float.json": evaluated("/somewhere/fp32.onnx", "fp32", 94.0),
        "int8.json": evaluated("int8.onnx", "int8", 93.5),
        "engine.json": evaluated("x.engine", "int8", 93.0, "tensorrt 8.6.0"),
    },
    "timing": {
        "bench.json": timed(
            ("fp32.onnx", "onnxruntime", "fp32", 1, 30.0),
            ("fp32.onnx", "onnxruntime", "fp32", 8, 200.0),
            ("int8.onnx", "onnxruntime", "int8", 8, 100.0),
            ("int8.onnx", "onnxruntime", "int8", 1, 15.0),
            ("x.engine", "tensorrt 8.6.0", "int8", 1, 2.0),
            ("x.engine", "tensorrt 8.6.0, CUDA graph", "int8", 1, 1.0),
        )
    },
}
GOOD = {"agreement": 99.2, "kl": 0.0008, "images": 64, "good": True}


def shown(parts):
    return Page("".join(parts))


def test_accuracy_and_speed_stand_in_one_table():
    page = shown(summary(RESULTS, []))
    heading, *rows = page.tables[0]
    assert heading[3:] == ["Acc@1", "+-", "against float", "images", "batch", "ms", "times float"]
    assert rows == [
        ["fp32.onnx", "onnxruntime", "fp32", "94", "1", "-", "450", "1", "30", "-"],
        ["int8.onnx", "onnxruntime", "int8", "93.5", "1", "-0.5", "450", "1", "15", "2"],
        ["x.engine", "tensorrt", "int8", "93", "1", "-1", "450", "1", "1", "-"],  # no float engine was timed
    ]


def test_findings_are_sentences():
    said = summary(RESULTS, [("ptq.safetensors", GOOD)])[0]
    assert "<p>ptq.safetensors is near the float model: 99.2 % agreement, mean KL 0.0008, on 64 images" in said
    assert (
        "<p>int8.onnx on onnxruntime has 93.5 Acc@1, -0.50 against fp32.onnx and is 2.00 times as fast as float" in said
    )
    assert "x.engine on tensorrt has 93 Acc@1, -1.00 against fp32.onnx." in said
    assert "<p>fp32.onnx" not in said and "Next" not in said


@pytest.mark.parametrize(
    ("results", "verdict", "command"),
    [
        ({}, {**GOOD, "good": False}, "qswin sensitivity"),
        ({}, GOOD, "qswin evaluate"),
        ({"evaluation": RESULTS["evaluation"]}, GOOD, "qswin bench"),
    ],
)
def test_the_next_command_is_the_first_that_is_missing(results, verdict, command):
    said = summary(results, [("ptq", verdict)])[0]
    assert f"<p>Next: {command} " in said and said.count("Next") == 1
    assert ("is far from the float model" in said) == (not verdict["good"])


def test_values_from_elsewhere_are_text():
    hostile = {**GOOD, "agreement": "<script>", "kl": None, "images": [1]}
    results = {"evaluation": {"a": {**evaluated("<b>", "int8", "many"), "acc1_error": {}}, "b": {"acc1": 1.0}}}
    parts = summary(results, [("<i>", hostile)])
    text = "".join(parts)
    assert "&lt;i&gt; is near the float model: ? % agreement, mean KL ?, on ? images" in text
    assert not any(tag in text for tag in ("<script>", "<b>", "<i>"))


def test_an_empty_run_has_no_summary():
    assert summary({}, []) == []
