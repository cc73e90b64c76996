"""`qswin init`: what it says of a checkpoint, and that its config is taken at once."""

import json

import pytest
import torch

from qswin.models.checkpoints import state_dicts
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model
from tests.helpers import fails, invoke
from tests.models.checkpoints.test_logits import HF_SWIN, HF_VIT, save_pretrained, torchvision_swin


def test_what_it_says_and_writes(tmp_path, swin_file, data, capsys):
    out, report = tmp_path / "mine.yaml", tmp_path / "mine.json"
    assert invoke("init", swin_file, "--data", data, "--out", out, "--json", report) == 0
    said = capsys.readouterr().out
    assert "mine.pth: swin_tiny_patch4_window7_224 of torchvision, 5 classes, images of 16 pixels" in said
    assert "assumed: images of 16 x 16, which no tensor tells (model.kwargs.img_size)" in said
    found = json.loads(report.read_text())
    assert (found["kind"], found["library"], found["classes"]) == ("checkpoint description", "torchvision", 5)
    assert "# assumed: images of 16 x 16" in out.read_text()
    config = load_config(out, [])
    assert build_float_model(config.model, {}).preprocessing.size == (16, 16) and config.data.root == str(data)


@pytest.mark.slow
def test_its_config_calibrates(tmp_path, swin_file, data):
    out = tmp_path / "mine.yaml"
    assert invoke("init", swin_file, "--data", data, "--out", out) == 0
    small = ["calibration.images=8", "calibration.batch_size=4", "data.workers=0", "device=cpu", "recipe=gemm"]
    assert invoke("calibrate", "--config", out, f"run={tmp_path / 'run'}", *small) == 0
    assert (tmp_path / "run" / "ptq.safetensors").is_file()


@pytest.mark.parametrize("name", ["a b.pth", "a: b #c.pth", "ü\n- x: 1.pth", "'\".pth"])
def test_any_name_of_a_file_is_read_back(tmp_path, swin_file, name, monkeypatch):
    swin_file.rename(tmp_path / name)
    out = tmp_path / "x.yaml"
    assert invoke("init", tmp_path / name, "--out", out) == 0
    config = load_config(out, ["data.root=unused"])
    assert config.model.checkpoint == str(tmp_path / name)
    assert build_float_model(config.model, {}).model.num_classes == 5


def test_other_classes_than_the_checkpoints_ask_for_a_new_head(tmp_path, data, capsys):
    save_pretrained("ViT", tmp_path / "vit", **{**HF_VIT, "num_attention_heads": 2})
    for index in range(2):
        (data / "train" / f"more{index}").mkdir()
    out = tmp_path / "a.yaml"
    assert invoke("init", tmp_path / "vit", "--data", data, "--out", out) == 0
    assert "new head: its head has 5 classes, the images 7; train the float model" in capsys.readouterr().out
    config = load_config(out, [])
    assert (config.model.new_head, config.model.num_classes, config.recipe) == (True, 7, "none")
    assert "model.new_head=false recipe=auto" in out.read_text()


def test_nothing_is_written_over_and_nothing_of_a_foreign_file(tmp_path, swin_file, capsys):
    out = tmp_path / "a.yaml"
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    assert "a foreign checkpoint" in fails(capsys, "init", tmp_path / "foreign.pth", "--out", out)
    assert "no such checkpoint" in fails(capsys, "init", tmp_path / "none.pth", "--out", out)
    assert "must end in .yaml" in fails(capsys, "init", swin_file, "--out", tmp_path / "a.txt")
    assert not out.exists()
    out.write_text("mine")
    assert "is there already" in fails(capsys, "init", swin_file, "--out", out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("kind", ["a file", "a folder"])
def test_the_checkpoint_is_read_once(tmp_path, swin_file, monkeypatch, kind):
    if kind == "a folder":
        save_pretrained("ViT", tmp_path / "vit", **{**HF_VIT, "num_attention_heads": 2})
    path = swin_file if kind == "a file" else tmp_path / "vit"
    read = []
    monkeypatch.setattr(state_dicts, "read_content", lambda file: read.append(file) or file.read_bytes())
    assert invoke("init", path, "--out", tmp_path / "a.yaml") == 0
    assert len(read) == 1


def test_a_head_for_an_unknown_number_of_classes_is_not_invented(tmp_path, data, capsys):
    state = torchvision_swin(False).state_dict()
    file, out = tmp_path / "backbone.pth", tmp_path / "a.yaml"
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, file)
    line = fails(capsys, "init", file, "--out", out)
    assert (
        "swin_tiny_patch4_window7_224 of torchvision without a head" in line
        and "give --data DIR" in line
        and "or --backbone for its maps" in line
    )
    assert not out.exists()
    assert invoke("init", file, "--out", out, "--data", data) == 0
    config = load_config(out, [])
    assert (config.model.new_head, config.model.num_classes) == (True, 5)


def test_a_backbone_of_the_same_file(tmp_path, swin_file, capsys):
    out = tmp_path / "a.yaml"
    assert invoke("init", swin_file, "--backbone", "--out", out) == 0
    assert "a backbone that gives stage1, stage2, images of any size" in capsys.readouterr().out
    assert "its train/ holds images, of any size" in out.read_text()
    config = load_config(out, ["data.root=unused"])
    assert (config.model.new_head, config.model.num_classes, config.recipe) == (False, None, "auto")
    maps = build_float_model(config.model, {}).model(torch.zeros(1, 3, 40, 24))
    assert list(maps) == [f"stage{stage}" for stage in range(1, len(maps) + 1)] and len(maps) > 1


def test_a_backbone_gives_the_maps_that_its_file_has_norms_for(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    settings = transformers.SwinConfig(**HF_SWIN, out_features=["stage2"])
    transformers.SwinBackbone(settings).save_pretrained(tmp_path / "swin")
    out, report = tmp_path / "a.yaml", tmp_path / "a.json"
    assert "or --backbone for its maps" in fails(capsys, "init", tmp_path / "swin", "--out", out)
    assert invoke("init", tmp_path / "swin", "--backbone", "--out", out, "--json", report) == 0
    assert json.loads(report.read_text())["out_features"] == ["stage2"]
    config = load_config(out, ["data.root=unused"])
    assert list(build_float_model(config.model, {}).model(torch.zeros(1, 3, 40, 24))) == ["stage2"]


def test_a_vit_gives_no_feature_maps(tmp_path, capsys):
    save_pretrained("ViT", tmp_path / "mine", **{**HF_VIT, "num_attention_heads": 2})
    line = fails(capsys, "init", tmp_path / "mine", "--backbone", "--out", tmp_path / "a.yaml")
    assert "vit_tiny_patch16_224 gives no feature maps; --backbone takes Swin" in line
