"""Timing: medians of a clock we turn ourselves; the command over ONNX files and a checkpoint."""

import itertools
import json

import numpy as np
import pytest

from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import save_checkpoint
from qswin.trt.evaluation.timing import (
    CUDA_GRAPH,
    Subject,
    TimingOptions,
    measure,
    rates,
    speed_up,
    time_batches,
)
from tests.helpers import DESCRIPTION, fails, invoke, small_swin


def test_the_first_run_and_the_warm_up_do_not_count():
    clock = itertools.chain([90.0, 50.0, 50.0], [1.0, 2.0, 9.0])
    measured = measure(lambda: next(clock), warmup=2, repeats=3)
    assert measured["first_ms"] == 90 and measured["ms"] == 2 and 2 < measured["p95_ms"] <= 9


def test_rates_and_speed_ups():
    row = rates({"ms": 4.0}, 8)
    assert row["images_per_second"] == 2000
    assert speed_up(row, {"ms": 6.0}) == "1.50" and speed_up(row, None) == "-"


class Recorder(Subject):
    """Takes batches of 2 to 4; a run takes as many milliseconds as there are images, as a graph half of that."""

    def __init__(self, cpu_warmup: int | None = None) -> None:
        self.row = {"model": "m", "backend": "b", "precision": "int8", "device": "d"}
        self.preprocessing, self.smallest, self.largest = Preprocessing(size=(8, 8)), 2, 4
        self.cpu_warmup, self.seen, self.runs = cpu_warmup, [], 0

    def run(self, ms: float) -> float:
        self.runs += 1
        return ms

    def timers(self, images, cuda_graph):
        self.seen.append(images)
        yield "", lambda: self.run(len(images))
        if cuda_graph:
            yield CUDA_GRAPH, lambda: self.run(len(images) / 2)


def test_a_row_for_each_batch_that_a_model_takes_and_each_way_to_run_it():
    rows = list(time_batches(Recorder(), [1, 2, 4, 8], TimingOptions(warmup=0, repeats=1, cuda_graph=True)))
    assert [(row["batch"], row["backend"], row["ms"]) for row in rows] == [
        (2, "b", 2),
        (2, "b, CUDA graph", 1),
        (4, "b", 4),
        (4, "b, CUDA graph", 2),
    ]
    assert list(rows[0]) == [
        *("model", "backend", "precision", "device", "first_ms", "ms", "p95_ms", "batch", "images_per_second")
    ]


@pytest.mark.parametrize(("cpu_warmup", "runs"), [(None, 1 + 20 + 30), (1, 1 + 1 + 5), (2, 1 + 2 + 5)])
def test_a_cpu_warms_up_and_repeats_less(cpu_warmup, runs):
    subject = Recorder(cpu_warmup)
    list(time_batches(subject, [2], TimingOptions(warmup=20, repeats=30, cpu_repeats=5)))
    assert subject.runs == runs


def test_what_is_timed_is_not_a_blank_image():
    subject = Recorder()
    list(time_batches(subject, [4], TimingOptions(warmup=0, repeats=1)))
    (images,) = subject.seen
    assert images.shape == (4, 3, 8, 8) and images.dtype == np.float32
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


@pytest.mark.slow
def test_side_by_side(graphs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    checkpoint = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, small_swin(depths=[2, 1]), DESCRIPTION)
    models = [str(checkpoint), str(graphs["fp32"]), str(graphs["int8-batch2"])]
    more = [
        "--batch-sizes",
        "1,2",
        "--cpu-repeats",
        "2",
        "--json",
        str(tmp_path / "b.json"),
        "--plot",
        str(tmp_path / "b.png"),
    ]
    assert invoke("bench", "--model", *models, *more, "--device", "cpu") == 0
    result = json.loads((tmp_path / "b.json").read_text())
    rows = result["rows"]
    assert result["kind"] == "timing"
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
    [
        (["a.txt"], "a.txt: not a model file that qswin knows; its name must end in one of .qsb, .pt2, .onnx, .engine"),
        (["a.onnx", "--batch-sizes", "x"], "--batch-sizes 'x': give batch sizes"),
        (["a.onnx", "--batch-sizes", "0,1"], "--batch-sizes '0,1': give batch sizes"),
    ],
)
def test_what_cannot_be_timed_says_so(arguments, message, capsys):
    assert message in fails(capsys, "bench", "--model", *arguments)
