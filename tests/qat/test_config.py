"""Configurations: overrides, and errors that name key, place and nearest key."""

from pathlib import Path

import pytest
import yaml

from qswin.qat.config import claim_run, load_config, recipe_of
from qswin.qat.quant.recipe import Recipe

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


def test_a_missing_value_says_how_to_give_it(tmp_path):
    (tmp_path / "a.yaml").write_text("model:\n  name: x\nrun: runs/x\n")
    with pytest.raises(ValueError, match="data.root is not set; add data.root=VALUE"):
        load_config(tmp_path / "a.yaml", [])
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_config(tmp_path / "b.yaml", [])


def test_recipes_are_names_or_mappings(config_file):
    assert recipe_of(load_config(config_file, ["recipe=gemm"])).name == "gemm"
    written = "{name: mine, weight_bits: 4, rules: [{sites: fc1, quantize: true}]}"
    recipe = recipe_of(load_config(config_file, [f"recipe={written}", "calibration.calibrator=max"]))
    assert isinstance(recipe, Recipe) and (recipe.weight_format, recipe.calibrator) == ("int4", "max")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_that_comes_with_qswin_loads(file):
    config = load_config(file, ["data.root=x", "run=y"])
    assert recipe_of(config).rules
    yaml.safe_load(file.read_text())


def test_a_run_folder_belongs_to_one_job(config_file):
    config, other = load_config(config_file, []), load_config(config_file, ["train.lr=1"])
    claim_run(other, "train", ("last.pt",))
    folder = claim_run(config, "train", ("last.pt",))  # the other job left nothing
    (folder / "last.pt").touch()
    assert claim_run(config, "train", ("last.pt",)) == folder  # the same job may come back
    claim_run(other, "calibrate", ("ptq.safetensors",))  # another stage has its own settings
    with pytest.raises(ValueError, match=r"used by another job.*train\.lr=0\.001, not 1\.0.*choose another run"):
        claim_run(other, "train", ("last.pt",))
