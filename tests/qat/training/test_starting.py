"""Training starts from what the config describes, and from nothing else."""

import dataclasses

import pytest

from qswin.qat.checkpoint import load_checkpoint, save_checkpoint
from qswin.qat.config import load_config
from qswin.qat.distributed import process_group
from qswin.qat.ptq.job import run_calibration
from qswin.qat.quant.recipe import RECIPES, Rule
from qswin.qat.training.trainer import Trainer
from tests.helpers import V2

HALF = "{name: mine, rules: [{sites: fc1, quantize: true}, {sites: fc2, quantize: true}]}"
LESS = "{name: mine, rules: [{sites: fc1, quantize: true}, {sites: qkv, quantize: true}]}"


@pytest.fixture
def start(config_file):
    """Calibrates with one set of overrides, and starts training with another."""

    def start(calibration: list[str], training: list[str]) -> Trainer:
        with process_group("cpu") as ranks:
            path = run_calibration(load_config(config_file, calibration), ranks)
            return Trainer(load_config(config_file, [f"init={path}", *training]), ranks)

    return start


@pytest.mark.parametrize(
    ("calibration", "training", "words"),
    [
        ([], [f"model.name={V2}"], f"its model has name=swin_tiny_patch4_window7_224, the config model.name={V2}"),
        ([], ["model.num_classes=7"], "its model has num_classes=5, the config model.num_classes=7"),
        ([], ["model.kwargs.depths=[2, 1]"], r"its model has depths=\[2, 2\], the config model.kwargs.depths=\[2, 1\]"),
        (
            [],
            ["model.kwargs.drop_path_rate=0.2"],
            "its model has drop_path_rate=None, the config model.kwargs.drop_path_rate=0.2",
        ),
        (
            [],
            ["data.preprocessing.crop_pct=0.5"],
            "its preprocessing has crop_pct=0.9, data.preprocessing.crop_pct is 0.5",
        ),
        ([], ["recipe=gemm"], "its recipe is 'full', the config's is 'gemm'; set recipe=full"),
        ([f"recipe={HALF}"], [f"recipe={LESS}"], "its recipe 'mine' has rules.1.sites=fc2, the config's has qkv"),
        (
            [f"recipe={HALF}"],
            [f"recipe={HALF[:-1]}, per_channel: false}}"],
            "its recipe 'mine' has per_channel=True, the config's has False",
        ),
    ],
)
def test_what_differs_from_the_checkpoint_is_named(start, calibration, training, words):
    with pytest.raises(ValueError, match=rf"ptq\.safetensors: {words}") as error:
        start(calibration, training)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("calibration", "training"),
    [
        (["calibration.calibrator=max"], ["calibration.calibrator=percentile:99"]),
        ([f"recipe={HALF}"], [f"recipe={HALF.replace('mine', 'theirs')}"]),
        ([f"recipe={HALF}"], [f"recipe={HALF[:-2]}, {{sites: fc1, calibrator: max}}], weight_calibrator: mse}}"]),
        (["data.preprocessing.crop_pct=0.8"], ["data.preprocessing.crop_pct=0.8"]),
        (["data.preprocessing.crop_pct=0.8"], []),
    ],
)
def test_names_and_calibrators_do_not_matter_to_training(start, calibration, training):
    assert start(calibration, training).description.stage == "qat"


def test_a_recipe_that_was_changed_since_is_noticed(start, tmp_path, config_file):
    """A sidecar whose recipe has the name, but not the rules, of the one in the config."""
    with process_group("cpu") as ranks:
        path = run_calibration(load_config(config_file, ["recipe=gemm"]), ranks)
    model, description = load_checkpoint(path)
    changed = dataclasses.replace(
        RECIPES["gemm"], rules=(*RECIPES["gemm"].rules, Rule("layers.0", weight_calibrator="mse"))
    )
    save_checkpoint(tmp_path / "same.safetensors", model, dataclasses.replace(description, recipe=changed))
    config = load_config(
        config_file, [f"init={tmp_path / 'same.safetensors'}", "recipe=gemm", f"run={tmp_path / 'other'}"]
    )
    assert Trainer(config, ranks).task == "classification"  # calibrators alone
    config.recipe = {**RECIPES["gemm"].to_dict(), "rules": [{"sites": "fc1", "quantize": True}]}
    with pytest.raises(ValueError, match="its recipe 'gemm' has rules.0.sites=.*the config's has fc1"):
        Trainer(config, ranks)
