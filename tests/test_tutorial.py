"""The commands of docs/tutorial.md, in order, from an empty folder, on a small model; those marked GPU need one."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from models.registry import build_model
from tests.conftest import SMALL, V1, write_images
from tests.test_cli import invoke

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
JOB = f"""\
model:
  name: {V1}
  num_classes: 2
  checkpoint: mine.pth
  kwargs: {{img_size: 32, patch_size: 2, window_size: 4, embed_dim: 16, depths: [1, 1], num_heads: [2, 4]}}
data: {{root: photos, workers: 0}}
calibration: {{images: 8, batch_size: 4}}
train: {{epochs: 1, batch_size: 4, lr: 1.0e-4, distill: 0.5}}
run: runs/mine
device: cpu
"""


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", classes=2, each=4)
    torch.save(build_model(V1, num_classes=2, **{**SMALL, "depths": [1, 1]}).state_dict(), "mine.pth")
    Path("mine.yaml").write_text(JOB)
    assert len(commands()) > 15 and all(line.startswith("qswin ") for line in commands())
    for line in commands():
        if line.endswith("# GPU") and not torch.cuda.is_available():
            continue
        _, command, *arguments = shlex.split(line, comments=True)
        assert invoke(command, *arguments) == 0, f"{line}\n{capsys.readouterr().err}"
    assert {"report.html", "qat.safetensors", "int8.onnx", "rtx.engine", "mixed.yaml"} <= {
        path.name for path in Path("runs/mine").iterdir()
    }
