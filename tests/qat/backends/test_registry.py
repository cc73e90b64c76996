"""Backends are found by suffix and target; one can be added from outside; flags are for a target or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import read_sidecar
from qswin.qat.backends import registry
from qswin.qat.backends.findings import Finding
from qswin.qat.backends.registry import Backend, backend_of, build_targets, open_predictor, register
from qswin.qat.checkpoint import save_checkpoint
from qswin.trt.evaluation.timing import Subject, wall_clock
from tests.helpers import DESCRIPTION, fails, invoke, small_swin


@dataclasses.dataclass(frozen=True)
class ListOptions:
    target: str = "list"
    level: int = 1


class Constant:
    """Says the same of every image: the numbers that its file lists."""

    backend, precision, task, classes, batch_size = "constant", "text", "classification", None, None
    preprocessing = Preprocessing(size=(32, 32))

    def __init__(self, path: Path) -> None:
        self.logits = np.array([float(word) for word in path.read_text().split()], dtype=np.float32)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.tile(self.logits, (len(images), 1))


class ConstantSubject(Subject):
    cpu_warmup = 0

    def __init__(self, path: Path) -> None:
        self.row = {"model": path.name, "backend": "constant", "precision": "text", "device": "CPU"}
        self.predictor = Constant(path)
        self.preprocessing = self.predictor.preprocessing

    def timers(self, images, cuda_graph):
        yield "", wall_clock(lambda: self.predictor(images))


class ConstantBackend(Backend):
    name, suffixes, targets, kind = "constant", (".txt",), ("list",), "constant"
    sources = {"onnx": ListOptions}

    def open(self, path: Path, options: registry.OpenOptions) -> Constant:
        return Constant(path)

    def subjects(self, path: Path, opening: Any, timing: Any) -> Any:
        yield ConstantSubject(path)

    def build(self, source: Path, output: Path, options: ListOptions) -> tuple[bytes, dict[str, Any]]:
        return b"0 2 1 0 0", {"level": options.level, "seconds": 0.0}

    def findings(self) -> list[Finding]:
        return [Finding("constant", "1.0", "text files")]


@pytest.fixture
def constant(monkeypatch):
    """A backend from outside the repository."""
    known = dict(registry._known())
    monkeypatch.setattr(registry, "_known", lambda: known)
    register(ConstantBackend())


def test_a_backend_from_outside_builds_evaluates_times_and_is_listed(constant, data, tmp_path, capsys):
    model = tmp_path / "a.txt"
    assert invoke("build", "--target", "list", "--onnx", "x.onnx", "--engine", model, "--level", 0) == 0
    assert read_sidecar(model, "constant", ("level",), "")["level"] == 0
    assert invoke("evaluate", "--model", model, "--data", data / "val", "--json", tmp_path / "e.json") == 0
    assert json.loads((tmp_path / "e.json").read_text())["acc1"] == 20  # class 1 of five
    assert invoke("bench", "--model", model, "--batch-sizes", "1,3", "--json", tmp_path / "b.json") == 0
    assert [row["batch"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]] == [1, 3]
    assert invoke("doctor") == 0 and "text files" in capsys.readouterr().out


def test_what_another_backend_has_is_refused(constant):
    class Greedy(ConstantBackend):
        name, suffixes, targets = "greedy", (".onnx",), ()

    with pytest.raises(ValueError, match=r"backend greedy: \.onnx belongs to backend onnxruntime"):
        register(Greedy())


def test_an_unknown_suffix_is_answered_with_all_known_ones():
    with pytest.raises(ValueError) as error:
        backend_of(Path("a.tflite"))
    assert all(suffix in str(error.value) for suffix in (".onnx", ".engine", ".plan", ".pt2", ".safetensors", ".pth"))
    assert build_targets() == ["bundle", "inductor", "tensorrt", "tensorrt-rtx"]


@pytest.mark.parametrize(
    ("target", "flag", "value"),
    [
        ("tensorrt", "--capability", "8.9"),
        ("tensorrt-rtx", "--calib-cache", "a.cache"),
        ("tensorrt-rtx", "--checkpoint", "a.safetensors"),
        ("inductor", "--level", 0),
        ("inductor", "--timing-cache", "timing.cache"),
        ("inductor", "--workspace", "1GiB"),
    ],
)
def test_a_flag_that_a_target_lacks_is_refused(target, flag, value, tmp_path, capsys):
    source = ("--checkpoint", "a.safetensors") if target == "inductor" else ("--onnx", "a.onnx")
    line = fails(capsys, "build", "--target", target, *source, "--engine", tmp_path / "a.x", flag, value)
    assert f"{flag} is not for --target {target}" in line


def test_an_engine_is_not_written_over_a_file_of_another_kind(graphs, tmp_path, capsys):
    checkpoint = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, small_swin(depths=[2, 1]), DESCRIPTION)
    before = checkpoint.read_bytes()
    common = ("build", "--onnx", graphs["fp32"], "--engine")
    assert "the name must end in .engine or .plan" in fails(capsys, *common, checkpoint)
    (tmp_path / "b.engine.json").write_text('{"kind": "evaluation"}')
    assert "is the JSON of a evaluation" in fails(capsys, *common, tmp_path / "b.engine")
    assert checkpoint.read_bytes() == before and not (tmp_path / "b.engine").exists()


def test_a_checkpoint_is_opened_like_any_other_model(tmp_path, images):
    checkpoint = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, model := small_swin(depths=[2, 1]).eval(), DESCRIPTION)
    logits = open_predictor(checkpoint)(images.numpy())
    np.testing.assert_allclose(logits, model(images).detach().numpy(), atol=1e-5)


def test_bare_weights_are_timed_and_evaluated_with_settings_over_their_config(config_file, data, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    common = ("--model", weights, "--config", config_file, "--set", "model.num_classes=5", "--device", "cpu")
    assert invoke("evaluate", *common, "--data", data / "val", "--batch-size", 7) == 0
    assert invoke("bench", *common, "--batch-sizes", 1, "--cpu-repeats", 1) == 0
    wrong = ("--set", "model.num_classes=7")
    assert "not (7, 32)" in fails(capsys, "evaluate", *common, *wrong, "--data", data / "val")
