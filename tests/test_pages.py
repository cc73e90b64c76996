"""The commands of README.md and docs/, in order, on a small model. Those whose comment says GPU need one."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qswin.models.registry import build_model
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import SMALL, V1, invoke, write_images

ROOT = Path(__file__).resolve().parents[1]
JOB = f"""\
model:
  name: {V1}
  num_classes: 2
  checkpoint: mine.pth
  kwargs: {{img_size: 32, patch_size: 2, window_size: 4, embed_dim: 16, depths: [1, 1], num_heads: [2, 4]}}
data: {{root: photos, workers: 0}}
calibration: {{images: 8, batch_size: 4}}
train: {{epochs: 1, batch_size: 4, lr: 1.0e-4, distill_weight: 0.5}}
run: runs/mine
device: cpu
"""
NAMES = {
    "DIR": "photos",
    "FILE": "mine.pth",
    ".venv/bin/qswin": "qswin",
    "reconstruct_steps=500": "reconstruct_steps=2",
}
ELSEWHERE = ("make ", "pip ")  # CI runs `make`


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Photos of two classes, a model of one's own, and the two configs that the pages name."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", classes=2, each=4)
    state = build_model(V1, num_classes=2, **{**SMALL, "depths": [1, 1]}).state_dict()
    torch.save(state, "mine.pth")
    for config in (Path("mine.yaml"), Path("configs/swin_tiny_tinyimagenet.yaml")):
        config.parent.mkdir(exist_ok=True)
        config.write_text(JOB)
    return tmp_path


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *ELSEWHERE))]


def write_files(page: str) -> None:
    """The files that a page writes out: `NAME.yaml`: and a block. Those that the fixture has stay as they are."""
    for name, text in re.findall(r"`([\w.]+\.yaml)`:\n\n```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if not Path(name).exists():
            Path(name).write_text(text)


def execute(line: str) -> int:
    """Runs a line as a user of the small model would type it; the exit code."""
    for name, value in NAMES.items():
        line = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", value, line)
    program, *arguments = shlex.split(line, comments=True)
    if program == "qswin":
        return invoke(*arguments)
    assert program == "torchrun", line
    arguments = [str(ROOT / word) if word == "qat/train.py" else word for word in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], env=environment).returncode


def run_page(page: str, capsys) -> int:
    """Runs a page's commands that this machine can; how many there were."""
    write_files(page)
    lines = [line for line in commands(page) if torch.cuda.is_available() or "GPU" not in line.partition("#")[2]]
    for line in lines:
        assert execute(line) == 0, f"{page}: {line}\n{capsys.readouterr().err}"
    return len(lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial(folder, capsys):
    assert run_page("docs/tutorial.md", capsys) > 15
    assert {"report.html", "qat.safetensors", "int8.onnx", "rtx.engine", "mixed.yaml", "pictures"} <= {
        path.name for path in Path("runs/mine").iterdir()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_and_the_pages_that_go_on_from_it(folder, capsys):
    assert run_page("README.md", capsys) > 10
    for page in ("docs/recipes.md", "docs/tensorrt.md", "docs/performance.md"):
        assert run_page(page, capsys) > 0
    save_as_theirs()
    assert run_page("docs/moving.md", capsys) > 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(block, {"weights": None, "batches": [torch.randn(1, 3, 224, 224)]})
    assert OnnxRuntimePredictor(Path("int8.onnx"))(np.zeros((1, 3, 224, 224), np.float32)).shape == (1, 200)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_python_on_backbones():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "backbones.md").read_text(), re.DOTALL):
        exec(block, scope)
    twin, detector = scope["twin"], scope["detector"].eval()
    (found,) = detector([torch.rand(3, 96, 160)])
    assert set(found) == {"boxes", "labels", "scores"} and detector.backbone is twin
    assert {type(twin.fpn.inner_blocks[0][0]).__name__, type(detector.rpn.head.conv[0][0]).__name__} == {
        "QuantConv2d",
        "Conv2d",
    }


def save_as_theirs() -> None:
    """The checkpoint of recipe gemm under the names that ModelOpt would give it."""
    from safetensors.torch import load_file

    state = load_file("runs/gemm/ptq.safetensors")
    torch.save({re.sub(r"\._(input|weight)_q", r".\1_q", name): value for name, value in state.items()}, "theirs.pth")


class Parsed(Exception):
    """A benchmark has read its command line."""


def read_command_line(name: str, arguments: list[str], monkeypatch) -> None:
    """Starts a benchmark and ends it where it has parsed its arguments, which exits where it does not take them.

    Raises:
        ModuleNotFoundError: it needs a library that is not installed.
    """
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    with pytest.raises(Parsed):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("docs/results.md", 2),
        ("docs/lab/accuracy.md", 7),
        ("docs/lab/tensorrt.md", 4),
        ("docs/lab/robustness.md", 3),
        ("docs/performance.md", 4),
        ("docs/moving.md", 1),
        ("docs/bundle.md", 1),
        ("SECURITY.md", 1),
    ],
)
def test_benchmarks_take_the_options_that_are_given(page, count, monkeypatch, capsys):
    """They take hours, or a GPU: what produced the figures is not run here."""
    text = (ROOT / page).read_text().replace("\\\n", " ")  # a command may go on in the next line
    lines = re.findall(r"python -m benchmarks\.(\w+)([^\n#`]*)", text)
    assert len(lines) >= count
    for name, arguments in lines:
        words = shlex.split(arguments)
        try:
            read_command_line(name, words, monkeypatch)
        except ModuleNotFoundError as missing:
            assert missing.name is not None and not missing.name.startswith(("benchmarks", "qswin")), missing
            source = (ROOT / "benchmarks" / f"{name}.py").read_text()
            assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source], (name, words)
        except SystemExit:
            pytest.fail(f"{page}: benchmarks.{name} {arguments}: {capsys.readouterr().err}")
        finally:
            monkeypatch.undo()
