"""The job of `qswin calibrate`: from a config to a checkpoint and its histograms, whatever the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qswin.calib.calibrators import BINS, find_range
from qswin.calib.data.folders import ImageFolder
from qswin.calib.data.images import Preprocessing
from qswin.calib.histogram_file import HISTOGRAMS, load_histograms
from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import Ranks, process_group
from qswin.qat.float_model import FloatModel
from qswin.qat.ptq.job import class_names, run_calibration
from qswin.qat.ptq.ranges import activation_quantizers
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe


def test_the_command_writes_a_checkpoint_that_loads(config_file, data):
    config = load_config(config_file, ["calibration.equalize=true"])
    with process_group("cpu") as ranks:
        path = run_calibration(config, ranks)
    model, description = load_checkpoint(path)
    assert description.stage == "ptq" and description.recipe == named_recipe("full")
    assert description.classes == ("class0", "class1", "class2", "class3", "class4")
    verdict = description.metrics.pop("verdict")
    assert description.metrics == {"calibration_images": 8, "unreadable_images": 0} and verdict["images"] == 2
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_the_command_leaves_its_histograms(config_file):
    """Every calibrated range is the one that its calibrator takes from the histogram beside the checkpoint."""
    with process_group("cpu") as ranks:
        path = run_calibration(load_config(config_file, []), ranks)
    model, _ = load_checkpoint(path)
    found = load_histograms(path.with_name(HISTOGRAMS))
    weights = {name: found.pop(name) for name in list(found) if name.endswith("_weight_quantizer")}
    observed = {name: module for name, module in model.named_modules() if module in set(activation_quantizers(model))}
    assert set(found) == {name for name, module in observed.items() if module.spec.amax is None}
    assert {name for name, _ in model.named_modules() if name.endswith("_weight_quantizer")} == set(weights)
    for name, observation in weights.items():
        weight = model.get_parameter(name.replace("_weight_quantizer", "weight")).detach().numpy()
        shares = np.abs(weight) / np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
        assert observation.histogram.amax == 1 and observation.histogram.counts.sum() == weight.size
        assert (observation.histogram.counts[: BINS // 4].sum()) == (shares < 0.5).sum()  # the bins reach to 2
    for name, observation in found.items():
        spec = observed[name].spec
        assert observation.format == spec.grid.name
        expected = find_range(observation.histogram, spec.calibrator, spec.grid)
        assert observed[name].amax.item() == pytest.approx(expected, rel=1e-6)


def test_the_command_corrects_biases_and_reconstructs(config_file):
    """At 4 bits one changes the biases, the other the weights, and the checkpoint has constant ranges all the same."""
    rules = "[{sites: '*', quantize: true}]"
    recipe = f"recipe={{name: low, weight_bits: 4, activation_bits: 4, weight_calibrator: mse, rules: {rules}}}"
    states = []
    for index, extra in enumerate(([], ["calibration.correct_biases=true"], ["calibration.reconstruct_steps=4"])):
        config = load_config(config_file, [recipe, f"run={config_file.parent / str(index)}", *extra])
        with process_group("cpu") as ranks:
            model, _ = load_checkpoint(run_calibration(config, ranks))
        states.append(model.state_dict())
    assert set(states[0]) == set(states[1]) == set(states[2])
    for changed, parameter in ((1, "bias"), (2, "weight")):
        name = f"layers.0.blocks.0.attn.qkv.{parameter}"
        assert not torch.equal(states[0][name], states[changed][name])


def test_reconstruction_draws_from_the_jobs_seed(config_file, monkeypatch):
    seeds = []
    monkeypatch.setattr("qswin.qat.ptq.calibrate.reconstruct", lambda *arguments: seeds.append(arguments[-1]))
    with process_group("cpu") as ranks:
        run_calibration(load_config(config_file, ["calibration.reconstruct_steps=4", "seed=3"]), ranks)
    assert seeds == [3]


def test_reconstruction_needs_one_process(config_file):
    config = load_config(config_file, ["calibration.reconstruct_steps=4"])
    with pytest.raises(ValueError, match="one process"):
        run_calibration(config, Ranks(0, 2, torch.device("cpu")))


@pytest.mark.slow
def test_two_ranks_find_the_ranges_of_one_process(config_file, tmp_path):
    """Two gloo processes under torchrun, three images in one and four in the other."""
    overrides = ["calibration.images=7", "calibration.batch_size=2", "recipe=auto"]
    overrides += ["calibration.budget=1e-5", "calibration.equalize=true"]
    launch = {
        "one": [sys.executable, "-m", "qswin", "calibrate"],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29611",
            "-m",
            "qswin",
            "calibrate",
        ],
    }
    found, left = {}, {}
    for name, command in launch.items():
        arguments = ["--config", str(config_file), *overrides, f"run={tmp_path / name}"]
        subprocess.run([*command, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        model, description = load_checkpoint(tmp_path / name / "ptq.safetensors")
        left[name] = description.recipe.in_float
        found[name] = {quantizer.site: quantizer.amax for quantizer in quantizers(model)}
        metrics = json.loads((tmp_path / name / "ptq.safetensors.json").read_text())["metrics"]
        assert metrics["calibration_images"] == 7
    torch.testing.assert_close(found["one"], found["two"], rtol=1e-4, atol=0)
    assert left["one"] == left["two"]


def test_unreadable_images_are_counted_when_skipped(config_file, data):
    for bad in (data / "train").glob("*/0.png"):
        bad.write_bytes(b"no image")
    with process_group("cpu") as ranks:
        with pytest.raises(ValueError, match=r"0\.png"):
            run_calibration(load_config(config_file, ["calibration.images=20"]), ranks)
        config = load_config(config_file, ["calibration.images=20", "data.skip_unreadable=true"])
        config.run += "2"
        _, description = load_checkpoint(run_calibration(config, ranks))
    found = description.metrics
    assert found["calibration_images"] + found["unreadable_images"] == 18  # two are for the verdict
    assert 3 <= found["unreadable_images"] <= 5


def test_a_recipe_that_quantizes_nothing_is_refused(config_file):
    with pytest.raises(ValueError, match="recipe 'none' quantizes nothing; choose one of gemm, attention, auto, full"):
        run_calibration(load_config(config_file, ["recipe=none"]), Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("folders", "of_checkpoint", "named"),
    [
        (("cat", "dog"), None, ("cat", "dog")),
        (("cat", "dog"), ("red", "blue"), ("cat", "dog")),
        ((), ("red", "blue"), ("red", "blue")),  # a flat folder
        ((), None, None),
        (("a", "b", "c"), ("red", "blue"), ("red", "blue")),
        (("a", "b", "c"), None, None),
    ],
)
def test_class_folders_name_the_classes_where_they_are_as_many(folders, of_checkpoint, named, caplog):
    model = torch.nn.Linear(1, 2)
    model.num_classes = 2
    floating = FloatModel(model, {}, Preprocessing(), classes=of_checkpoint)
    assert class_names(ImageFolder(Path("photos"), folders, ()), floating) == named
    assert ("photos: 3 folders of images, but 2 classes in the model" in caplog.text) is (len(folders) == 3)


def test_the_checkpoints_classes_in_another_order_are_refused():
    model = torch.nn.Linear(1, 2)
    model.num_classes = 2
    with pytest.raises(ValueError, match="class 0 is 'blue' here but 'red' in the checkpoint"):
        class_names(
            ImageFolder(Path("photos"), ("blue", "red"), ()),
            FloatModel(model, {}, Preprocessing(), classes=("red", "blue")),
        )
