"""Timing: medians of a clock we turn ourselves; the command over ONNX files and a checkpoint."""

import argparse
import itertools
import json

import pytest

from qswin.qat.checkpoint import save_checkpoint
from qswin.trt.evaluation.timing import bench_onnx, measure, rates, speed_up
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import DESCRIPTION, fails, invoke, small_swin


def test_the_first_run_and_the_warm_up_do_not_count():
    clock = itertools.chain([90.0, 50.0, 50.0], [1.0, 2.0, 9.0])
    measured = measure(lambda: next(clock), warmup=2, repeats=3)
    assert measured["first_ms"] == 90 and measured["ms"] == 2 and 2 < measured["p95_ms"] <= 9


def test_rates_and_speed_ups():
    row = rates({"ms": 4.0}, 8)
    assert row["images_per_second"] == 2000
    assert speed_up(row, {"ms": 6.0}) == "1.50" and speed_up(row, None) == "-"


def test_what_is_timed_is_no_blank_image(graphs, monkeypatch):
    seen = []
    monkeypatch.setattr(OnnxRuntimePredictor, "__call__", lambda self, images: seen.append(images))
    args = argparse.Namespace(threads=1, warmup=1, repeats=2, cpu_repeats=2)
    (row,) = bench_onnx(graphs["fp32"], [4], args)
    assert row["batch"] == 4 and len(seen) == 4
    for images in seen:
        assert images.shape == (4, 3, 32, 32) and abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05


def test_side_by_side(graphs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    checkpoint = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, small_swin(depths=[2, 1]), DESCRIPTION)
    models = [str(checkpoint), str(graphs["fp32"]), str(graphs["int8-batch2"])]
    more = ["--batch", "1,2", "--cpu-repeats", "2", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert invoke("bench", "--model", *models, *more, "--device", "cpu") == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    kinds = [(row["backend"], row["precision"], row["batch"]) for row in rows]
    assert kinds == [
        ("torch", "fp32", 1),
        ("torch", "fp32", 2),
        ("onnxruntime", "fp32", 1),
        ("onnxruntime", "fp32", 2),
        ("onnxruntime", "int8", 2),
    ]
    assert all(row["ms"] > 0 for row in rows) and (tmp_path / "b.png").stat().st_size > 5000
    assert "x torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a.txt"], "a.txt: cannot be measured here; give .onnx"), (["a.onnx", "--batch", "x"], "--batch x: give batch sizes")],
)
def test_what_cannot_be_timed_says_so(arguments, message, capsys):
    assert message in fails(capsys, "bench", "--model", *arguments)
