"""Configurations: overrides, and errors that name key, place and nearest key."""

import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qswin.models import download
from qswin.models.registry import build_model
from qswin.qat.config import load_config, settings_of
from qswin.qat.float_model import build_float_model
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.schema import RENAMED, keys_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_overrides_come_over_the_file_over_the_defaults(config_file):
    config = load_config(config_file, ["train.lr=1e-4", "train.amp=bf16", "train.augment.scale=[0.5, 1.0]"])
    assert (config.train.lr, config.train.amp, config.train.batch_size, config.train.epochs) == (1e-4, "bf16", 4, 1)
    assert tuple(config.train.augment.scale) == (0.5, 1.0)
    assert config.model.kwargs["embed_dim"] == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  learning_rate: 1\n", r":2: unknown key 'train.learning_rate'.*nearest"),
        ("mdoel:\n  name: x\n", r":1: unknown key 'mdoel'; the nearest is 'model"),
        ("train:\n  epochs: 1\n  lr: fast\n", r":3: train.lr: .*fast"),
        ("train:\n  epochs: [1]\n", r":2: train.epochs"),
        ("train: 3\n", r":1: "),
        ("- a\n- b\n", "not a mapping"),
        ("a: [1\n", "not YAML"),
        ("", "not a mapping"),
    ],
)
def test_mistakes_in_a_file_name_key_and_line(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)bad\.yaml.*{words.lstrip(':')}"):
        load_config(tmp_path / "bad.yaml", [])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "override 'train.lrr=1': unknown key 'train.lrr'; the nearest is 'train.lr'"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs", "key=value"),
        ("data.workers=[", "not YAML"),
    ],
)
def test_mistakes_in_an_override_name_it(config_file, override, words):
    with pytest.raises(ValueError, match=words):
        load_config(config_file, [override])


def test_a_section_whose_keys_are_comments_sets_nothing(tmp_path):
    (file := tmp_path / "a.yaml").write_text("data:\n  # root: DIR\ntrain:\n  augment:\nseed: 3\n")
    config = load_config(file, ["data.root=photos", "model.name=swin_tiny_patch4_window7_224", "run=runs/a"])
    assert (config.data.root, config.seed) == ("photos", 3)


def test_a_missing_value_says_how_to_give_it(tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  name: x\nrun: runs/x\n")
    with pytest.raises(ValueError, match="data.root is not set; add data.root=VALUE"):
        load_config(tmp_path / "a.yaml", [])
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(tmp_path / "b.yaml", [])


def recipe_of(config):
    return read_recipe(config.recipe, config.calibration.calibrator, config.calibration.budget)


def test_recipes_are_names_files_or_mappings(config_file, tmp_path):
    assert recipe_of(load_config(config_file, ["recipe=gemm"])) == RECIPES["gemm"]
    assert recipe_of(load_config(config_file, ["recipe=gemm", "calibration.budget=0.5"])).budget == 0.5
    written = {"name": "mine", "per_channel": False, "rules": [{"sites": "fc1", "quantize": True}]}
    recipe = recipe_of(load_config(config_file, [f"recipe={written}", "calibration.calibrator=max"]))
    assert (recipe.name, recipe.per_channel, recipe.calibrator, len(recipe.rules)) == ("mine", False, "max", 1)
    (file := tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    assert recipe_of(load_config(config_file, [f"recipe={file}"])).to_dict() == {
        **recipe.to_dict(),
        "calibrator": None,
    }


@pytest.mark.parametrize("text, words", [("3", "not a recipe"), ("a: [", "not YAML"), (None, "no such recipe file")])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, words):
    file = tmp_path / "broken.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"broken\.yaml: {words}"):
        read_recipe(str(file))
    with pytest.raises(ValueError, match="recipe=7: give a name"):
        read_recipe(7)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_comes_with_qswin_loads_by_the_names_of_today(file, caplog):
    config = load_config(file, ["data.root=x", "run=y"])
    assert recipe_of(config).rules
    assert not caplog.records


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_read_and_said_to_be_old(config_file, caplog, old):
    value = {"train.accumulate": 3, "calibration.choose": True}.get(old, 0.5)
    config = load_config(config_file, [f"{old}={value}"])
    for part in RENAMED[old].split("."):
        config = getattr(config, part)
    assert config == value
    assert [record.getMessage() for record in caplog.records] == [
        f"override '{old}={value}': {old} is an old name; write {RENAMED[old]}"
    ]


def test_every_key_has_one_sentence():
    for key in keys_of().values():
        assert key.help[0] in "`" + key.help[0].upper() and key.help.endswith(".") and len(key.help) > 12, key.name


def test_every_number_has_two_bounds():
    """A config from elsewhere asks for no 10^30 passes, and for no 10^9 processes."""
    for key in keys_of().values():
        numbers = {int, float} & {key.type, *typing.get_args(key.type)}
        assert not numbers or None not in (key.least, key.most), key.name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.amp=fp8", r"^override 'train.amp=fp8': train.amp=fp8 is not known; choose fp32, bf16, fp16$"),
        ("resume=yes", "resume.* is not known; choose auto, never"),
        ("data.decoder=jpeg", "data.decoder=jpeg is not known; choose pillow, dali"),
        ("train.log_every=0", "train.log_every=0 is out of range; give 1 to 1000000000"),
        ("train.epochs=1000000000000", "train.epochs=1000000000000 is out of range; give 1 to 100000"),
        ("data.workers=100000", "data.workers=100000 is out of range; give 0 to 1024"),
        ("train.distill_weight=1.5", "train.distill_weight=1.5 is out of range; give 0 to 1"),
        ("train.lr=.nan", "train.lr=nan is out of range"),
        ("data.workers=-1", "data.workers=-1 is out of range; give 0 to 1024"),
        ("train.batch_size=0", "train.batch_size=0 is out of range; give 1 to 1000000"),
        ("train.lr=0", "train.lr=0.0 is out of range; give 1e-12 to 10"),
        ("train.lr=-1", "train.lr=-1.0 is out of range"),
        ("train.min_lr=1", "train.min_lr=1.0 is above train.lr=0.001; lower it"),
        ("train.ema_decay=2", "train.ema_decay=2.0 is out of range; give 0 to 1"),
        ("train.augment.mixup=nan", "train.augment.mixup=nan is out of range"),
        ("train.augment.mixup=.inf", "train.augment.mixup=inf is out of range"),
        ("train.augment.scale=[1, 0]", "train.augment.scale=.* is out of range; give 0.0001 to 1"),
        ("train.augment.scale=[1, 0.5]", "train.augment.scale=.*: give the smaller one first"),
        ("train.save_minutes=.inf", "train.save_minutes=inf is out of range"),
        ("recipe=${oc.env:HOME}", r"override .*: recipe: \${...} is not expanded; write the value out"),
        ("model.kwargs={act_layer: '${oc.env:HOME}'}", r"model.kwargs: \${...} is not expanded"),
    ],
)
def test_values_that_are_not_allowed_are_refused(config_file, override, words):
    with pytest.raises(ValueError, match=words):
        load_config(config_file, [override])


def test_settings_are_a_config_file_again(config_file, tmp_path):
    config = load_config(config_file, ["recipe={name: mine, rules: []}", "train.lr=1e-7"])
    (again := tmp_path / "again.yaml").write_text(yaml.safe_dump(settings_of(config)))
    assert load_config(again, []) == config


def build(config_file, *overrides):
    config = load_config(config_file, ["model.checkpoint=null", *overrides])
    return build_float_model(config.model, config.data.preprocessing)


def test_one_number_is_the_side_of_a_square(config_file):
    settings = "model.kwargs.img_size=64", "data.preprocessing.size=64", "data.preprocessing.size=[64, 64]"
    built = [build(config_file, settings[0], size).preprocessing for size in settings[1:]]
    assert built[0] == built[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.kwargs.in_chans=1", "in_chans=1 is not supported: images have three channels"),
        ("model.kwargs.features_only=true", "features_only=True is not supported: out_features makes a backbone"),
        ("data.preprocessing.size=[64]", r"data.preprocessing: size is \[64\]: expected array of length 2, got 1"),
        ("data.preprocessing.size=large", "data.preprocessing: size is 'large': expected array, got str"),
        ("data.preprocessing.size=0", r"data.preprocessing: size\[0\] is 0: expected int >= 1"),
        ("data.preprocessing.size=1000000", r"data.preprocessing: size\[0\] is 1000000: expected int <= 4096"),
        ("data.preprocessing.mean=0.5", "data.preprocessing: mean is 0.5: expected array, got float"),
        ("data.preprocessing.std=[1, 1]", "data.preprocessing: std is .*: expected array of length 3, got 2"),
        ("data.preprocessing.std=[1, 1, 0]", r"data.preprocessing: std\[2\] is 0: expected float > 0"),
        ("data.preprocessing.crop_pct=all", "data.preprocessing: crop_pct is 'all': expected float, got str"),
        ("data.preprocessing.crop_pct=.nan", "data.preprocessing: crop_pct is nan: expected float >= 0.05"),
        ("data.preprocessing.interpolation=[1]", r"interpolation is \[1\]: expected str, got array"),
        ("data.preprocessing.interpolation=area", "interpolation is 'area': invalid enum value 'area'"),
        ("data.preprocessing.size=31", r"size is \(31, 31\), but model .* takes \(32, 32\); set model.kwargs.img_size"),
        ("model.kwargs.drop_path_rate=5", "drop_path_rate=5: give a share, 0 or more and below 1"),
        ("model.kwargs.device=meta", "'device' is not a setting of the architecture"),
        ("data.preprocessing.sizes=64", "data.preprocessing.sizes is not known; the keys are size"),
    ],
)
def test_values_that_no_model_can_use_are_one_line(config_file, override, words):
    with pytest.raises(ValueError, match=words) as error:
        build(config_file, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["calibrate", "train", "convert"])
def test_help_needs_no_torch(command):
    arguments = [sys.executable, "-m", "tests.without_torch", command, "--help"]
    done = subprocess.run(arguments, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert f"usage: qswin {command}" in done.stdout, done.stderr


def test_published_weights_without_a_network_are_refused_at_once(monkeypatch):
    """Nothing listens at this address: the Hub's own client would ask again and again, with 46 s of sleep between."""
    slept = []
    monkeypatch.setattr(download.constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(
        ValueError, match=r"weights of swin_tiny_patch4_window7_224 cannot be downloaded.*model.checkpoint="
    ):
        build_model("swin_tiny_patch4_window7_224", pretrained=True)
    assert sum(slept) < 1 and not download.constants.HF_HUB_OFFLINE


def test_an_error_that_says_nothing_is_named_by_its_type(config_file, monkeypatch):
    def update(*args, **kwargs):
        raise OmegaConfBaseException("")

    monkeypatch.setattr(OmegaConf, "update", update)
    with pytest.raises(ValueError, match="model.name: OmegaConfBaseException$"):
        load_config(config_file, ["recipe=gemm"])
