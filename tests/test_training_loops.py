"""The loops of docs/training-loops.md, as they are, on a small model: all train it to the same weights."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import qswin
from qswin.qat.quant.quantizers import Mode, quantizers
from tests.helpers import SMALL, V1, twin_of, write_images

ROOT = Path(__file__).resolve().parents[1]
LOOPS = ROOT / "docs" / "loops"
SETTINGS = {**SMALL, "depths": [1, 1], "drop_path_rate": 0.0}
PHOTOS = """\
import torch
from torch.utils.data import TensorDataset

generator = torch.Generator().manual_seed(3)
DATASET = TensorDataset(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5)


def photos(preprocessing):
    return DATASET
"""
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A calibrated checkpoint, and one batch of images in all: what is learned does not depend on their order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "photos", raising=False)
    Path("photos.py").write_text(PHOTOS)
    recipe = qswin.named_recipe("full")
    twin = twin_of(IMAGES, recipe, **SETTINGS)
    description = qswin.Description(
        {"name": V1, "num_classes": 5, **SETTINGS}, "ptq", qswin.Preprocessing(size=(32, 32)), recipe=recipe
    )
    qswin.save_checkpoint("ptq.safetensors", twin, description)
    yield tmp_path
    sys.modules.pop("photos", None)


def run(name: str, backend: str | None = None) -> dict:
    """A loop's names after it has run. Without a backend for it, nothing is compiled."""
    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "compile",
            lambda model, **options: compile(model, backend=backend, **options) if backend else model,
        )
        return runpy.run_path(str(LOOPS / f"{name}.py"))


def torchrun(name: str) -> None:
    """Runs a loop in two processes on CPUs, with the images of this folder and not those beside the loop."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(LOOPS / f"{name}.py")]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def parameters(file: str) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in qswin.load_checkpoint(file)[0].parameters()]).detach()


def assert_trained_as_in_a_plain_loop(*files: str) -> None:
    """Whether checkpoints have moved from the calibrated one as that of the plain loop, in one process, has."""
    run("plain")
    start, expected = parameters("ptq.safetensors"), parameters("plain.safetensors")
    moved = (expected - start).abs().mean()
    assert moved > 1e-5
    for file in files:
        assert (parameters(file) - expected).abs().mean() < 1e-3 * moved, file
        model, description = qswin.load_checkpoint(file)
        assert description.stage == "qat" and {q.mode for q in quantizers(model)} == {Mode.QUANTIZING}


@pytest.mark.slow
def test_plain_pytorch_compiled_as_one_graph(folder, capsys):
    """aot_eager traces forward and backward as Inductor does, which takes many minutes to compile them on a CPU."""
    run("plain", "aot_eager")
    losses = [float(found) for found in re.findall(r"loss (\d\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    for end in ("", ".json"):
        Path(f"plain.safetensors{end}").rename(f"compiled.safetensors{end}")
    assert_trained_as_in_a_plain_loop("compiled.safetensors")


def test_saving_and_going_on(folder):
    found = run("saving")
    assert_same_outputs(found["again"], found["model"])
    assert bool(found["optimizer"].state_dict()["state"][0]["exp_avg"].any())


def assert_same_outputs(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(found.eval()(IMAGES), expected.eval()(IMAGES))


def test_timms_script_by_three_lines(folder):
    lines = (LOOPS / "timm_script.py").read_text().splitlines()
    assert sum(line.endswith("# qswin") for line in lines) == 3
    found = run("timm_script")
    assert_trained_as_in_a_plain_loop("timm.safetensors")
    assert_same_outputs(qswin.load_checkpoint("timm_ema.safetensors")[0], found["model_ema"].module)
    again = qswin.load_checkpoint("ptq.safetensors")[0]
    timm.models.load_checkpoint(again, "last.pth.tar", use_ema=False)
    assert_same_outputs(again, found["model"])


@pytest.mark.slow
def test_lightning(folder):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    found = run("lightning_module")
    assert_trained_as_in_a_plain_loop("lightning.safetensors")
    (file,) = Path("lightning").rglob("*.ckpt")
    again = found["Quantized"].load_from_checkpoint(file, weights_only=True)
    assert_same_outputs(again.model, found["module"].model)


@pytest.mark.slow
def test_the_trainer_of_hugging_face(folder):
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    found = run("hugging_face")
    assert_trained_as_in_a_plain_loop("hugging_face.safetensors")
    again = qswin.load_checkpoint("ptq.safetensors")[0]
    again.load_state_dict(safetensors.torch.load_file("hugging_face/checkpoint-4/model.safetensors"))
    assert_same_outputs(again, found["model"])


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder):
    """DDP and FSDP2, on the same batch in total."""
    torchrun("ddp")
    torchrun("fsdp2")
    assert_trained_as_in_a_plain_loop("ddp.safetensors", "fsdp2.safetensors")
    again = qswin.load_checkpoint("ptq.safetensors")[0]
    again.load_state_dict(torch.load("fsdp2.pt", weights_only=True))
    assert_same_outputs(again, qswin.load_checkpoint("fsdp2.safetensors")[0])


def test_photos_are_prepared_as_the_models_images_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", classes=2, each=2)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    preprocessing = qswin.Preprocessing(size=(32, 32), mean=mean, std=std)
    dataset = runpy.run_path(str(LOOPS / "photos.py"))["photos"](preprocessing)
    image, label = dataset[3]
    pixels = image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert (len(dataset), label, image.shape, image.dtype) == (4, 1, (3, 32, 32), torch.float32)
    assert 0 <= pixels.min() and 0.2 < pixels.max() <= 1


@pytest.mark.parametrize("file", sorted(LOOPS.glob("*.py")), ids=lambda file: file.stem)
def test_the_page_shows_the_loop_as_it_is_tested(file):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training-loops.md").read_text(), re.DOTALL)
    assert file.read_text() in blocks
