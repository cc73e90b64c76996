"""Checkpoints and their sidecars; checkpoints of pytorch-quantization."""

import dataclasses
import json

import pytest
import torch

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import sidecar_path
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import SMALL, V1, small_swin

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


def test_a_path_may_be_text_and_must_be_a_checkpoints(tmp_path, quantized):
    save_checkpoint(str(tmp_path / "a.safetensors"), quantized, DESCRIPTION)
    assert load_checkpoint(str(tmp_path / "a.safetensors"))[1] == DESCRIPTION
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_checkpoint(tmp_path / "b.pth", quantized, DESCRIPTION)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "a.safetensors.json"]


def test_a_sidecar_of_another_architecture_is_refused(saved):
    sidecar = sidecar_path(saved)
    values = json.loads(sidecar.read_text())
    values["model"]["embed_dim"] = 32
    sidecar.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has shape"):
        load_checkpoint(saved)


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
