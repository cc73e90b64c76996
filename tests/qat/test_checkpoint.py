"""Checkpoints and their sidecars; checkpoints of pytorch-quantization."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import sha256, sidecar_path
from qswin.models import registry
from qswin.models.checkpoints.state_dicts import read_state
from qswin.qat import checkpoint
from qswin.qat.checkpoint import Description, load_checkpoint, load_model, read_description, save_checkpoint
from qswin.qat.config import load_config
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import SMALL, V1, V2, fails, small_swin

DESCRIPTION = Description(
    {"name": V1, "num_classes": 5, **SMALL},
    "ptq",
    Preprocessing(size=(32, 32), crop_pct=1.0),
    classes=("a", "b", "c", "d", "e"),
    recipe=named_recipe("full"),
    parent="ab" * 32,
    metrics={"acc1": 50.0},
)


@pytest.fixture
def saved(tmp_path, quantized):
    save_checkpoint(tmp_path / "ptq.safetensors", quantized, DESCRIPTION)
    return tmp_path / "ptq.safetensors"


def test_a_checkpoint_comes_back_as_it_was(saved, quantized, images):
    model, description = load_checkpoint(saved)
    assert description == DESCRIPTION
    with torch.no_grad():
        assert torch.equal(model(images), quantized(images))


def test_a_float_checkpoint_too(tmp_path, images):
    model = small_swin()
    save_checkpoint(tmp_path / "a.safetensors", model, dataclasses.replace(DESCRIPTION, recipe=None, stage="float"))
    loaded, _ = load_checkpoint(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_uncalibrated_models_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="patch_embed: its range was never calibrated"):
        save_checkpoint(tmp_path / "a.safetensors", quantize(small_swin(), named_recipe("full")), DESCRIPTION)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (lambda file: file.unlink(), FileNotFoundError, "no such checkpoint"),
        (lambda file: sidecar_path(file).unlink(), FileNotFoundError, "sidecar ptq.safetensors.json is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), ValueError, "truncated or changed"),
        (lambda file: sidecar_path(file).write_text("{}"), ValueError, "not the sidecar of a checkpoint"),
        (lambda file: sidecar_path(file).write_text("[1]"), ValueError, "not a JSON object"),
        (lambda file: sidecar_path(file).write_bytes(b"\xff\x00"), ValueError, "not JSON"),
    ],
)
def test_broken_checkpoints_say_what_is_wrong(saved, harm, error, words):
    harm(saved)
    with pytest.raises(error, match=words):
        load_checkpoint(saved)


def test_a_sidecar_under_its_old_name_is_read(saved):
    """Before 0.2 it was `ptq.json` and had no kind."""
    values = json.loads(sidecar_path(saved).read_text())
    sidecar_path(saved).unlink()
    saved.with_suffix(".json").write_text(json.dumps({key: value for key, value in values.items() if key != "kind"}))
    assert load_checkpoint(saved)[1] == DESCRIPTION


OTHERS = (
    {"name": V2, "num_classes": 5, **SMALL},
    {**DESCRIPTION.model, "num_classes": 6},
    {**DESCRIPTION.model, "depths": [2, 1]},
)
LARGER = Preprocessing(size=(64, 64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": OTHERS[0]}, "description.model and its recipe say: .*logit_scale is missing"),
        ({"model": OTHERS[1]}, r"head.fc.weight has shape \(5, 32\), not \(6, 32\)"),
        ({"model": OTHERS[2]}, "layers.1.blocks.1.* is not a tensor"),
        (
            {"model": {**DESCRIPTION.model, "img_size": 64}},
            r"size is \(32, 32\), but what description.model builds takes \(64",
        ),
        ({"recipe": None}, "_amax is not a tensor"),
        (
            {"recipe": dataclasses.replace(named_recipe("full"), per_channel=False)},
            r"_amax has shape \(16, 1, 1, 1\), not \(\)",
        ),
        ({"preprocessing": LARGER}, r"preprocessing.size is \(64, 64\), but the model takes \(32, 32\)"),
        ({"classes": ("a", "b")}, "description.classes has 2 names, but the model has 5 classes"),
    ],
)
def test_a_description_of_another_model_is_not_saved(tmp_path, quantized, changes, words):
    with pytest.raises(ValueError, match=f"a.safetensors: not saved: .*{words}") as error:
        save_checkpoint(tmp_path / "a.safetensors", quantized, dataclasses.replace(DESCRIPTION, **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_described_as_without_its_quantizers(tmp_path):
    with pytest.raises(ValueError, match="patch_embed.proj._input_quantizer._amax is missing"):
        save_checkpoint(tmp_path / "a.safetensors", small_swin(), DESCRIPTION)


def test_saving_draws_no_random_numbers(tmp_path, quantized):
    """The check builds a model, whose weights are drawn; a run that saves goes on as one that does not."""
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.safetensors", quantized, DESCRIPTION)
    assert torch.equal(torch.randn(3), expected)


def test_flags_of_quantizers_that_are_off_are_left_out(tmp_path, quantized, images):
    """They may be part of a module's state, but a checkpoint's quantizers quantize."""
    quantizer = next(quantizers(quantized))
    quantizer.register_buffer("_off", torch.tensor(True))
    save_checkpoint(tmp_path / "a.safetensors", quantized, DESCRIPTION)
    assert not [name for name in read_state(tmp_path / "a.safetensors") if name.endswith("_off")]
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")[0](images), quantized(images))


def test_a_path_may_be_text_and_must_be_a_checkpoints(tmp_path, quantized):
    save_checkpoint(str(tmp_path / "a.safetensors"), quantized, DESCRIPTION)
    assert load_checkpoint(str(tmp_path / "a.safetensors"))[1] == DESCRIPTION
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(tmp_path / "b.pth", quantized, DESCRIPTION)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "a.safetensors.json"]


def test_the_checksum_of_bare_weights_is_of_what_was_read(config_file, monkeypatch):
    """Another file may stand under the name a moment later: its checksum would be that of other weights."""
    path = Path(load_config(config_file, []).model.checkpoint)
    first = path.read_bytes()

    def read(path):
        data = path.read_bytes()
        torch.save(small_swin(seed=1).state_dict(), path)
        return data

    monkeypatch.setattr(registry, "read_content", read)
    model, description, digest = load_model(path, str(config_file), [])
    assert torch.equal(model.head.fc.weight, small_swin().head.fc.weight)
    assert digest == description.parent == hashlib.sha256(first).hexdigest() != sha256(path)


def test_a_sidecar_of_another_architecture_is_refused(saved):
    sidecar = sidecar_path(saved)
    values = json.loads(sidecar.read_text())
    values["model"]["embed_dim"] = 32
    sidecar.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has shape"):
        load_checkpoint(saved)


def places(value, path=()):
    """The path of everything in plain data."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


ODD = (None, True, 3, -1, 10**400, float("nan"), "x", "", [], [[]], {}, {"x": 1}, [None])


def test_a_sidecar_with_anything_anywhere_is_read_or_refused_by_a_line(saved, capsys):
    """Whatever a key's value is, `qswin inspect` reads it or ends in one line that names the file."""
    sidecar = sidecar_path(saved)
    whole = json.loads(sidecar.read_text())
    for number, path in enumerate(place for place in places(whole) if place and "sha256" not in place):
        values = json.loads(json.dumps(whole))
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = ODD[number % len(ODD)]
        sidecar.write_text(json.dumps(values))
        try:
            read_description(saved)
        except ValueError as error:
            assert str(error).startswith(str(saved.parent)) and "\n" not in str(error), path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "model is None: expected object, got null"),
        ({"model": {"num_classes": 5}}, "model has no name"),
        ({"model": {"name": ["a"]}}, "model has no name, or one that is not text"),
        ({"model": {"name": "resnet50"}}, "model 'resnet50' is not known"),
        ({"model": {**DESCRIPTION.model, "pretrained_cfg": {"url": "x"}}}, "'pretrained_cfg' is not a setting"),
        ({"model": {**DESCRIPTION.model, "img_size": 10**6}}, "img_size=1e"),
        ({"model": {**DESCRIPTION.model, "depths": [10**9]}}, "depths=1e"),
        ({"model": {**DESCRIPTION.model, "patch_size": [[2]]}}, "settings do not work"),
        ({"model": {**DESCRIPTION.model, "device": "meta"}}, "'device' is not a setting"),
        ({"classes": "abcde"}, "classes is 'abcde': expected array"),
        ({"stage": 3}, "stage is 3"),
        ({"recipe": {"name": "x", "rules": [{"sites": 1}]}}, r"recipe.rules\[0\].sites is 1: expected str, got int"),
        ({"recipe": "full"}, "recipe is 'full': expected object"),
        ({"preprocessing": {"std": [0, 1, 1]}}, r"preprocessing.std\[0\] is 0: expected float > 0"),
        ({"metrics": []}, r"metrics is \[\]: expected object, got array"),
        ({"parent": 3}, "parent is 3: expected str"),
        ({"surprise": 3}, "unknown key 'surprise'; the keys are model, stage"),
    ],
)
def test_a_sidecar_of_other_types_is_refused_by_key_and_value(saved, capsys, changes, words):
    sidecar = sidecar_path(saved)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))
    assert re.search(words, fails(capsys, "inspect", "--model", saved))


def test_what_is_loaded_is_what_was_checked(saved, quantized, images, monkeypatch):
    """A file that is swapped after its checksum was compared is not read again."""

    def swap(path, *rest):
        described = read_description(path, *rest)
        saved.write_bytes(b"other")
        return described

    monkeypatch.setattr(checkpoint, "read_description", swap)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(saved)[0](images), quantized(images))


def test_ranges_of_pytorch_quantization_load_by_name():
    """Its QuantLinear writes `<layer>._input_quantizer._amax` () and `<layer>._weight_quantizer._amax` [out, 1]."""
    twin = quantize(small_swin(), named_recipe("gemm"))
    state = small_swin().state_dict()
    linears = [name for name, module in small_swin().named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        state[f"{name}._input_quantizer._amax"] = torch.tensor(2.0)
        state[f"{name}._weight_quantizer._amax"] = torch.full((state[f"{name}.weight"].shape[0], 1), 0.5)
    result = twin.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} == {"patch_embed"}
    ranges = {quantizer.site: quantizer.amax for quantizer in quantizers(twin)}
    assert ranges["head"] == 2 and (ranges["layers.0.blocks.0.attn.qkv.weight"] == 0.5).all()
