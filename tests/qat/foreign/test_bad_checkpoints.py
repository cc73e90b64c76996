"""Bad checkpoints in the commands: one line, exit code 2, and nothing is written, not even in part."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from tests.helpers import fails, small_swin
from tests.models.checkpoints.test_logits import HF_CASES, save_pretrained, split


def of_another_model(path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), path)


def of_a_model_that_is_known_by_name(path: Path) -> None:
    with torch.device("meta"):
        names = timm.create_model("maxvit_tiny_tf_224").state_dict()
    torch.save({name: torch.zeros(1) for name in names}, path)


def half_a_file(path: Path) -> None:
    torch.save(small_swin().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_the_tensors(path: Path) -> None:
    torch.save({name: value for name, value in small_swin().state_dict().items() if "layers.1" not in name}, path)


def of_an_unknown_source(path: Path) -> None:
    """The shapes are those of the model."""
    torch.save({f"encoder.{name}": value for name, value in small_swin().state_dict().items()}, path)


def a_config_without_weights(path: Path) -> None:
    save_pretrained("Swin", path, **HF_CASES["swin"][1])
    (path / "model.safetensors").unlink()


def weights_without_a_config(path: Path) -> None:
    save_pretrained("Swin", path, **HF_CASES["swin"][1])
    (path / "config.json").unlink()


def half_of_the_files(path: Path) -> None:
    save_pretrained("Swin", path, **HF_CASES["swin"][1])
    split(path, "model.safetensors")
    next(path.glob("*-of-*")).unlink()


CASES: dict[Callable[[Path], None], str] = {
    of_another_model: "a foreign checkpoint",
    of_a_model_that_is_known_by_name: "MaxViT, which is not supported",
    half_a_file: "truncated",
    half_the_tensors: "is missing|not a whole checkpoint|layers.1|shape",
    of_an_unknown_source: "a foreign checkpoint .*'encoder.patch_embed.proj.weight'",
    a_config_without_weights: "a folder without weights",
    weights_without_a_config: "need the config.json",
    half_of_the_files: "missing, but model.safetensors.index.json names it",
}


FOLDERS = (a_config_without_weights, weights_without_a_config, half_of_the_files)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(make, config_file, data, tmp_path, capsys):
    bad, out = tmp_path / ("bad" if make in FOLDERS else "bad.pth"), tmp_path / "out"
    make(bad)
    before = sorted(tmp_path.rglob("*"))
    with_config = ("--config", config_file)
    lines = [
        fails(capsys, "init", bad, "--out", f"{out}.yaml", "--data", data),
        fails(capsys, "calibrate", *with_config, f"model.checkpoint={bad}", f"run={out}"),
        fails(capsys, "train", *with_config, "recipe=none", f"model.checkpoint={bad}", f"run={out}"),
        fails(capsys, "evaluate", "--model", bad, "--data", data / "val", "--json", f"{out}.json", *with_config),
        fails(capsys, "export", "--checkpoint", bad, "--onnx", f"{out}.onnx", *with_config),
    ]
    assert [line for line in lines if str(bad) not in line] == []
    assert [line for line in lines if not re.search(CASES[make], line)] == []
    assert sorted(tmp_path.rglob("*")) == before
