"""--dry-run: what a job would do, its inputs checked, nothing written."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.plan import check_writable
from qswin.qat.ptq.job import run_calibration
from tests.helpers import fails, invoke, lively_swin


@pytest.fixture
def dry(capsys, tmp_path):
    """Runs a command with --dry-run; returns its output. Nothing in the folder may change."""

    def run(*arguments) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert invoke(*arguments, "--dry-run") == 0 and snapshot(tmp_path) == before
        return capsys.readouterr().out

    return run


def snapshot(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def calibrated(config_file) -> Path:
    torch.save(lively_swin().state_dict(), load_config(config_file, []).model.checkpoint)
    with process_group("cpu") as ranks:
        return run_calibration(load_config(config_file, []), ranks)


def test_the_plans_of_the_jobs(config_file, data, tmp_path, dry, capsys):
    text = dry("calibrate", "--config", config_file)
    assert "5 classes, images of 32 x 32 pixels, weights of " in text and "recipe    full, " in text
    assert f"images    10 images of the 20 in {data / 'train'}, 2 for the verdict" in text
    assert f"writes    {tmp_path / 'run' / 'ptq.safetensors'}\n" in text
    checkpoint = calibrated(config_file)
    assert "state     done: " in (text := dry("calibrate", "--config", config_file)) and "writes" not in text
    text = dry("train", "--config", config_file, f"init={checkpoint}")
    assert "training  1 epochs of 5 steps of 4 images" in text and "state     from the beginning" in text
    assert f"writes    {tmp_path / 'run' / 'qat.safetensors'}" in text
    common = ["--checkpoint", checkpoint, "--data", data / "train", "--images", 4, "--device", "cpu"]
    report = tmp_path / "s.json"
    text = dry("sensitivity", *common, "--json", report, "--by", "layer")
    assert "groups    35, by layer: " in text and "4 images of " in text and "labelled" in text
    job = {"checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "by": "layer"}
    report.write_text(json.dumps({"kind": "sensitivity", "rows": [], "job": job}))
    search = ["search", *common, "--sensitivity", report, "--recipe", tmp_path / "mixed.yaml", "--budget"]
    assert "budget    kl<=0.5" in (text := dry(*search, "kl<=0.5")) and "mixed.yaml" in text
    assert "--budget 'dice_drop<=1'" in fails(capsys, *search, "dice_drop<=1", "--dry-run")


def test_wrong_inputs_are_found(config_file, data, tmp_path, capsys):
    def says(command, *overrides):
        return fails(capsys, command, "--config", config_file, *overrides, "--dry-run")

    assert "no such checkpoint" in says("calibrate", "model.checkpoint=missing.pth")
    assert "recipe 'fulll' is not known" in says("calibrate", "recipe=fulll")
    assert "run qswin calibrate first" in says("train")
    (blocked := tmp_path / "file").touch()
    assert f"because of {blocked}" in says("calibrate", f"run={blocked / 'run'}")
    (bad := data / "train" / "class0" / "0.png").write_bytes(b"no image")
    assert f"{bad}: missing, or cannot be read" in says("calibrate", "calibration.images=20")
    assert not (tmp_path / "run").exists()


def test_a_file_can_be_written_below_a_folder_that_is_there(tmp_path):
    check_writable(tmp_path / "new" / "newer" / "a.json")
    (file := tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot be written, because of {file}"):
        check_writable(file / "a.json")
