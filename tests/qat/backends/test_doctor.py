"""What doctor finds, and what it says of what is missing."""

import importlib.metadata
import importlib.util
import json

import onnxruntime
import pytest
import torch

from qswin.qat.backends import doctor, tensorrt
from qswin.trt.engines.cuda import Gpu
from tests.helpers import invoke


def test_the_command_reports_this_environment(tmp_path, capsys):
    assert invoke("doctor", "--json", tmp_path / "d.json") == 0
    result = json.loads((tmp_path / "d.json").read_text())
    found = result["findings"]
    assert result["kind"] == "doctor"
    assert found["torch"]["found"] == torch.__version__ and found["onnxruntime"]["found"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in found["onnxruntime"]["note"]
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_what_is_missing_comes_with_the_command_that_adds_it(monkeypatch):
    def missing_distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", missing_distribution)
    monkeypatch.setattr(doctor, "find_gpu", lambda: None)
    missing = doctor.examine()[1:]
    assert {finding.name for finding in missing} >= {"GPU", "torch", "onnxruntime", "tensorrt", "tensorrt-rtx", "timm"}
    assert all(finding.found is None for finding in missing)
    assert all("pip install" in finding.note for finding in missing if finding.name not in ("GPU", "libqswin.so"))


@pytest.mark.parametrize(
    ("target", "version", "words"),
    [
        ("tensorrt", "8.6.0", "weak typing, calibration caches, builds on its GPU, opset 17"),
        ("tensorrt", "11.0.1", "strong typing only, no calibration caches, builds on its GPU"),
        ("tensorrt-rtx", "1.7.1", "strong typing only, no calibration caches, builds on any machine"),
    ],
)
def test_a_tensorrt_says_what_it_allows(monkeypatch, target, version, words):
    monkeypatch.setattr(tensorrt, "version_of", lambda distribution: version)
    finding = tensorrt.finding(target)
    assert finding.found == version and finding.note.startswith(words)


def test_a_gpu_says_which_engines_run_on_it(monkeypatch):
    for capability, words in (("9.0", "no TensorRT-RTX"), ("8.9", "TensorRT-RTX too")):
        monkeypatch.setattr(doctor, "find_gpu", lambda capability=capability: Gpu("some GPU", capability))
        finding = doctor.gpu()
        assert capability in finding.found and words in finding.note
