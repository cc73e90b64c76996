"""A run folder belongs to one job: other jobs are refused, the same one goes on, says it is finished or starts over."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from qswin.calib.histogram_file import HISTOGRAMS
from qswin.calib.lock import LOCK, lock_folder
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.foreign.convert import convert
from qswin.qat.ptq.job import run_calibration
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.qat.runs import PTQ, Run, one_job
from qswin.qat.training.trainer import Trainer
from tests.helpers import fails, small_swin


@pytest.fixture
def open_run(config_file):
    """Opens the config's run folder as a job with overrides would."""
    return lambda job, *overrides: Run.of(load_config(config_file, list(overrides)), job)


def calibrated(config_file, *overrides):
    with process_group("cpu") as ranks:
        return run_calibration(load_config(config_file, list(overrides)), ranks)


def trained(config_file, *overrides):
    with process_group("cpu") as ranks:
        return Trainer(load_config(config_file, list(overrides)), ranks).run()


def steps(path) -> list[int]:
    lines = (path.parent / "log.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def foreign(tmp_path, images):
    """A checkpoint that another toolkit might have calibrated."""
    twin = quantize(small_swin(), named_recipe("full"))
    find_ranges(twin, [images])
    torch.save(twin.state_dict(), tmp_path / "theirs.pth")
    return f"model.checkpoint={tmp_path / 'theirs.pth'}"


def test_a_folder_with_products_takes_no_other_settings(open_run):
    open_run("train", "train.lr=1").claim()
    run = open_run("train")  # the other job left nothing
    run.claim()
    (run.folder / "last.pt").touch()
    open_run("train").claim()  # the same job may come back
    open_run("calibrate", "calibration.images=3").claim()  # makes other files
    with pytest.raises(
        ValueError, match=r"used by another job .train\.yaml has train\.lr=0\.001, not 1\.0.; choose another"
    ):
        open_run("train", "train.lr=1")
    open_run("train", "train.lr=1", "resume=never").claim()
    assert not (run.folder / "last.pt").exists()


@pytest.mark.parametrize(
    "override",
    [
        "data.workers=3",
        "data.root=elsewhere",
        "data.skip_unreadable=true",
        "train.save_minutes=1",
        "train.log_every=5",
        "device=cuda",
        "train.epochs=2",
        "calibration.images=3",
    ],
)
def test_what_does_not_change_the_results_is_not_compared(open_run, override):
    run = open_run("train")
    run.claim()
    (run.folder / "last.pt").touch()
    open_run("train", override).claim()
    assert (run.folder / "last.pt").exists()


def test_fewer_epochs_are_another_job(open_run):
    run = open_run("train", "train.epochs=3")
    run.claim()
    (run.folder / "last.pt").touch()
    with pytest.raises(ValueError, match="train.epochs=3, not 2"):
        open_run("train", "train.epochs=2")


def test_settings_under_their_old_names_are_the_same_job(open_run, config_file):
    run = open_run("train", "train.distill_weight=0.5")
    run.claim()
    file = run.folder / "train.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["train"]["distill"] = settings["train"].pop("distill_weight")
    del settings["train"]["compile"]  # as if the schema had gained it since
    file.write_text(yaml.safe_dump(settings))
    (run.folder / "last.pt").touch()
    open_run("train", "train.distill_weight=0.5")
    with pytest.raises(ValueError, match="train.distill_weight=0.5, not 0.4"):
        open_run("train", "train.distill_weight=0.4")


def test_a_recipe_is_compared_by_what_its_file_says(open_run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{name: mine, rules: [{sites: fc1, quantize: true}]}")
    run = open_run("calibrate", f"recipe={file}")
    run.claim()
    (run.folder / PTQ).touch()
    moved = shutil.copy(file, tmp_path / "moved.yaml")
    open_run("calibrate", f"recipe={moved}")
    file.write_text("{name: mine, rules: [{sites: fc2, quantize: true}]}")
    with pytest.raises(ValueError, match="recipe.rules.0.sites=fc1, not fc2"):
        open_run("calibrate", f"recipe={file}")


def test_a_file_that_the_job_did_not_make_is_not_overwritten(open_run):
    run = open_run("calibrate")
    run.folder.mkdir()
    (run.folder / PTQ).touch()
    for override in ("resume=auto", "resume=never"):
        with pytest.raises(ValueError, match=rf"{PTQ} was not made here by calibrate; choose another run"):
            open_run("calibrate", override)


def test_convert_and_calibrate_do_not_take_each_others_checkpoint(config_file, foreign, capsys):
    path = convert(load_config(config_file, [foreign]))
    before = path.read_bytes()
    line = fails(capsys, "calibrate", "--config", config_file)
    assert f"its {PTQ} was made by another job, convert; choose another run=FOLDER" in line
    assert fails(capsys, "calibrate", "--config", config_file, "resume=never") == line
    assert path.read_bytes() == before
    other = f"run={config_file.parent / 'calibrated'}"
    calibrated(config_file, other)
    assert "was made by another job, calibrate" in fails(capsys, "convert", "--config", config_file, foreign, other)


@pytest.mark.parametrize("command", ["calibrate", "convert", "train"])
def test_a_job_keeps_every_other_out_of_its_folder(config_file, command, capsys):
    run = config_file.parent / "run"
    with lock_folder(run):
        line = fails(capsys, command, "--config", config_file)
        assert f"{run}: process {os.getpid()} on " in line and "is at work there" in line
        assert [path.name for path in run.iterdir()] == [LOCK]


@pytest.mark.slow
def test_one_of_two_jobs_that_start_together_is_refused(config_file):
    command = [sys.executable, "-m", "qswin", "calibrate", "--config", str(config_file)]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [job.communicate()[1] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes == [0, 2] or (codes == [0, 0] and sum("already calibrated" in text for text in errors) == 1)
    if codes == [0, 2]:
        assert sum("is at work there" in text for text in errors) == 1
    assert not (config_file.parent / "run" / LOCK).exists()


def test_what_a_killed_job_left_half_written_goes(tmp_path):
    kept = (".last.pt.backup", ".of-the-user.0123abcd", "last.pt")
    for name in (*kept, f".{PTQ}.0123abcd", f".{PTQ}.json.0123abcd", ".train.yaml.tmpx1y2z", ".last.pt.0123abcd"):
        (tmp_path / name).touch()
    with one_job(tmp_path, main=False):
        assert (tmp_path / ".last.pt.0123abcd").exists()  # another rank of the same job clears up
    with one_job(tmp_path, main=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted((LOCK, *kept))


def test_convert_keeps_where_its_checkpoint_came_from(config_file, foreign):
    path = convert(load_config(config_file, [foreign]))
    assert (
        f"model.checkpoint={yaml.safe_load((path.parent / 'convert.yaml').read_text())['model']['checkpoint']}"
        == foreign
    )


def test_a_job_that_left_nothing_gives_its_place(config_file, foreign, open_run):
    open_run("calibrate").claim()
    path = convert(load_config(config_file, [foreign]))
    assert not (path.parent / "calibrate.yaml").exists()
    assert convert(load_config(config_file, [foreign])) == path


def test_a_second_calibration_says_that_it_is_finished(config_file, caplog):
    path = calibrated(config_file)
    made = path.stat().st_mtime_ns
    caplog.clear()
    caplog.set_level("INFO", logger="absl")
    assert calibrated(config_file) == path and path.stat().st_mtime_ns == made
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: already calibrated; resume=never starts over"
    ]


@pytest.mark.parametrize("damage", ["cut", "without sidecar", "without histograms"])
def test_a_calibration_that_is_not_whole_is_made_again(config_file, damage):
    path = calibrated(config_file)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:1000])
    elif damage == "without sidecar":
        path.with_name(f"{PTQ}.json").unlink()
    else:
        path.with_name(HISTOGRAMS).unlink()
    calibrated(config_file)
    assert path.read_bytes() == whole and path.with_name(HISTOGRAMS).is_file()


def test_calibration_starts_over_when_told_to(config_file):
    path = calibrated(config_file)
    with pytest.raises(ValueError, match=r"calibration\.images=8, not 4.*resume=never"):
        calibrated(config_file, "calibration.images=4")
    calibrated(config_file, "calibration.images=4", "resume=never")
    assert json.loads(path.with_name(f"{PTQ}.json").read_text())["metrics"]["calibration_images"] == 4


@pytest.mark.slow
def test_a_finished_training_goes_on_with_more_epochs_only(config_file, caplog):
    init = f"init={calibrated(config_file)}"
    path = trained(config_file, init)
    one = path.read_bytes()
    (path.parent / "last.pt").unlink()  # a finished training does not need it
    caplog.clear()
    caplog.set_level("INFO", logger="absl")
    assert trained(config_file, init) == path and path.read_bytes() == one
    assert [record.getMessage() for record in caplog.records if "already trained" in record.getMessage()]
    trained(config_file, init, "resume=never")
    assert path.read_bytes() == one
    trained(config_file, init, "train.epochs=2")
    assert steps(path) == list(range(10)) and path.read_bytes() != one
    with pytest.raises(ValueError, match="train.epochs=2, not 1"):
        trained(config_file, init)


@pytest.mark.slow
def test_another_checkpoint_under_the_name_of_init_is_noticed(config_file):
    ptq = calibrated(config_file)
    path = trained(config_file, f"init={ptq}")
    calibrated(config_file, "calibration.images=4", "resume=never")
    with pytest.raises(ValueError, match=r"qat\.safetensors: was trained from another file than init="):
        trained(config_file, f"init={ptq}")
    path.unlink()
    with pytest.raises(ValueError, match=r"last\.pt: was trained from another file than init="):
        trained(config_file, f"init={ptq}")
    trained(config_file, f"init={ptq}", "resume=never")


def test_training_that_starts_over_does_not_remove_what_it_starts_from(config_file):
    path = trained(config_file, "recipe=none")
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match="init=.*float.safetensors"):
            trained(config_file, "recipe=none", f"init={path}", f"resume={resume}")
    assert path.is_file()
