"""The comparison of lowered and fake-quantized models, on a small one."""

import json
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import lowered  # noqa: E402
from tests.helpers import write_images  # noqa: E402
from tests.qat.backends.test_bundle import save  # noqa: E402


def test_they_agree_on_a_small_model(images, tmp_path, monkeypatch, capsys):
    data = write_images(tmp_path / "data", classes=5)
    checkpoint = save(tmp_path / "x.safetensors", images, "attention")
    out = tmp_path / "rows.json"
    command = ["lowered", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    lowered.main()
    lowered.main()
    first, second = json.loads(out.read_text())
    assert first == second and first["images"] == 20
    assert first["agreement"] >= 95 and 0 <= first["kl"] < 1e-3
    assert abs(first["acc1_kernels"] - first["acc1_fake_quantized"]) <= 5
