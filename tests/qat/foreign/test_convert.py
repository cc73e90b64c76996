"""Checkpoints under the names of pytorch-quantization's users and of ModelOpt come out as ours."""

import copy
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.foreign.convert import convert
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.layers import QuantConv2d, QuantLinear
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule
from qswin.qat.quant.rewrite import quantize
from tests.helpers import lively_swin, small_swin
from tests.models.test_registry import original_layout

# As the first Swin system names them, written out.
THEIRS = {
    "attn.qk._input_quantizer": "attn.matmul_q_input_quantizer",
    "attn.qk._other_quantizer": "attn.matmul_k_input_quantizer",
    "attn.av._input_quantizer": "attn.matmul_a_input_quantizer",
    "attn.av._other_quantizer": "attn.matmul_v_input_quantizer",
    "add1._input_quantizer": "shortcut_input_quantizer",
    "add1._other_quantizer": "drop_path_input_quantizer",
    "add2._other_quantizer": "drop_path_2_input_quantizer",
}


def settings(config_file, path, recipe) -> list[str]:
    return [f"model.checkpoint={path}", f"recipe={json.dumps(recipe)}", f"run={config_file.parent / 'converted'}"]


def test_a_first_systems_checkpoint_computes_the_same(config_file, images, tmp_path):
    """Names of the original repository, [1] for a range, GEMM output quantizers too; no range for add2's shortcut."""
    recipe = dataclasses.replace(RECIPES["full"], rules=(*RECIPES["full"].rules, Rule("add2.shortcut", quantize=False)))
    twin = quantize(small_swin(), recipe)
    find_ranges(twin, [images])
    state = {}
    for key, value in original_layout(twin).items():
        for ours, theirs in THEIRS.items():
            key = key.replace(ours, theirs)
        state[key] = value.reshape(1) if value.ndim == 0 else value
    state["layers.0.blocks.0.attn.qkv._aftergemm_quantizer._amax"] = torch.ones(1)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    others = ("attn.conv", "expand", "concat_back_dim", "inner_blocks", "layer_blocks")  # of other families
    rules = [rule for rule in recipe.rules if rule.sites not in others]
    written = dataclasses.replace(recipe, name="first", rules=tuple(rules)).to_dict()
    model, description = load_checkpoint(
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", written)))
    )
    assert description.stage == "ptq" and description.recipe is not None and description.recipe.name == "first"
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))


def modelopts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its names: quantizers without an underscore."""
    return {re.sub(r"\._(input|weight)_q", r".\1_q", key): value for key, value in state.items()}


def test_a_modelopt_checkpoint_computes_the_same(config_file, images, tmp_path):
    """timm's names, and quantizers without an underscore; their other buffers are left."""
    twin = quantize(small_swin(), RECIPES["gemm"])
    find_ranges(twin, [images])
    state = modelopts(twin.state_dict())
    state["layers.0.blocks.0.norm1.input_quantizer._amax"] = torch.tensor(3.0)  # it quantizes what normalizations read
    state["layers.0.blocks.0.attn.qkv.input_quantizer._pre_quant_scale"] = torch.ones(16)
    torch.save(state, tmp_path / "theirs.pth")
    model, _ = load_checkpoint(
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", "gemm")))
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))


def fp8(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """ModelOpt's FP8 by hand: scaled by 448 / amax, cast, scaled back."""
    return (x * 448 / amax).clamp(-448, 448).to(torch.float8_e4m3fn).float() * amax / 448


def test_a_modelopt_fp8_checkpoint_computes_the_same(config_file, images, tmp_path):
    """With one range a weight, by the recipe that docs/moving.md gives; one layer by hand."""
    text = (Path(__file__).parents[3] / "docs" / "moving.md").read_text()
    recipe = yaml.safe_load(re.search(r"```yaml\n(name: modelopt-fp8.*?)```", text, re.DOTALL)[1])
    twin = quantize(small_swin(), Recipe.from_dict(recipe))
    find_ranges(twin, [images])
    torch.save(modelopts(twin.state_dict()), tmp_path / "theirs.pth")
    config = load_config(config_file, settings(config_file, tmp_path / "theirs.pth", recipe))
    model, _ = load_checkpoint(convert(config))
    layer, x = model.layers[0].blocks[0].mlp.fc1, torch.randn(7, 16)
    with torch.no_grad():
        weight = fp8(layer.weight, layer._weight_quantizer._amax)
        expected = torch.nn.functional.linear(fp8(x, layer._input_quantizer._amax), weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(images), twin(images))


def smoothquant(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ModelOpt's smoothquant (alpha 1) and its max calibration leave of a float model, in float64: weights, scales
    of every linear's input, the largest scaled input, and the largest of each row of the weight that it divides.
    """
    state = {key: value.double() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().double()}))
    with torch.no_grad():
        model(images)
    for name, layer in layers.items():
        x, weight = inputs[name], layer.weight.detach().double()
        if isinstance(layer, torch.nn.Linear):
            scale = 1 / x.abs().flatten(0, -2).amax(0).clamp(min=1e-4)
            x, weight = x * scale, weight / scale
            state[f"{name}.input_quantizer._pre_quant_scale"] = scale
        state[f"{name}.weight"] = weight
        state[f"{name}.input_quantizer._amax"] = x.abs().max()
        state[f"{name}.weight_quantizer._amax"] = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    return state


def rounded(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    return (x * 127 / amax).round().clamp(-128, 127) * amax / 127


def smoothquant_reference(
    model: torch.nn.Module, state: dict[str, torch.Tensor], images: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each layer of ModelOpt reads and gives with its state, in float64: x * scale is rounded, and so is the
    weight. The whole model is "" in it.
    """
    reference = copy.deepcopy(model).double()
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(layer: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor, name: str) -> torch.Tensor:
        scale = state.get(f"{name}.input_quantizer._pre_quant_scale", 1.0)
        x = rounded(args[0] * scale, state[f"{name}.input_quantizer._amax"])
        weight = rounded(state[f"{name}.weight"], state[f"{name}.weight_quantizer._amax"])
        if isinstance(layer, torch.nn.Linear):
            y = torch.nn.functional.linear(x, weight, layer.bias)
        else:
            y = torch.nn.functional.conv2d(x, weight, layer.bias, layer.stride)
        found[name] = args[0], y
        return y

    for name, layer in reference.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(functools.partial(forward, name=name))
    with torch.no_grad():
        found[""] = images, reference(images.double())
    return found


@pytest.mark.parametrize("shape", [(-1,), (1, -1)])
def test_a_smoothquant_checkpoint_computes_the_same(config_file, images, tmp_path, shape):
    """Inputs are multiplied by its scales, which its weights are divided by."""
    model = lively_swin()
    state = smoothquant(copy.deepcopy(model), images)
    expected = smoothquant_reference(model, state, images)
    written = {key: value.reshape(shape) if key.endswith("_scale") else value for key, value in state.items()}
    torch.save(written, tmp_path / "theirs.pth")
    converted, _ = load_checkpoint(
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", "gemm")))
    )
    assert len(expected) == sum(isinstance(m, QuantLinear | QuantConv2d) for m in converted.modules()) + 1
    for name, (x, y) in expected.items():
        with torch.no_grad():
            error = (converted.get_submodule(name)(x.float()) - y).abs().mean() / y.abs().mean()
        assert error < (1e-3 if name else 1e-2), name  # a value on the border of two levels may be rounded either way


@pytest.mark.parametrize(
    ("quantizer", "channels", "words"),
    [
        ("head.fc._input_quantizer", 32, "has no quantized input of a layer to scale here"),
        ("layers.0.blocks.0.norm1.input_quantizer", 16, "has no quantized input of a layer to scale here"),
        ("layers.0.blocks.0.attn.qkv.weight_quantizer", 16, "has no quantized input of a layer to scale here"),
        ("layers.0.blocks.0.attn.qkv.input_quantizer", 5, r"channel scales of shape \(5,\) do not fit"),
    ],
)
def test_scales_that_have_no_place_are_refused(config_file, images, tmp_path, quantizer, channels, words):
    """Without them the weights, which are divided by them, would give nonsense."""
    recipe = Recipe("no head", (Rule("attn.qkv", quantize=True),))
    twin = quantize(small_swin(), recipe)
    find_ranges(twin, [images])
    state = {**twin.state_dict(), f"{quantizer}._pre_quant_scale": torch.full((channels,), 0.5)}
    torch.save(modelopts(state), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=words):
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", recipe.to_dict())))


@pytest.mark.parametrize(
    ("calibrated", "asked", "words"),
    [("gemm", "full", "has no range in the file"), ("full", "gemm", "is in the file, but not in the recipe")],
)
def test_another_recipe_is_an_error(config_file, images, tmp_path, calibrated, asked, words):
    twin = quantize(small_swin(), RECIPES[calibrated])
    find_ranges(twin, [images])
    torch.save(twin.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=words):
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", asked)))


def test_a_checkpoint_must_be_given(config_file):
    with pytest.raises(ValueError, match="model.checkpoint is not set"):
        convert(load_config(config_file, ["model.checkpoint=null"]))
