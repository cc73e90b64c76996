"""Checkpoints under the names of pytorch-quantization's users and of ModelOpt come out as ours."""

import dataclasses

import pytest
import torch

from qswin.qat.checkpoint import load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.convert import convert
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import RECIPES, Rule
from qswin.qat.quant.rewrite import quantize
from tests.helpers import small_swin
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
    return [f"model.checkpoint={path}", f"recipe={recipe}", f"run={config_file.parent / 'converted'}"]


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
    rules = [rule for rule in recipe.rules if rule.sites not in ("attn.conv", "expand", "concat_back_dim")]
    written = dataclasses.replace(recipe, name="first", rules=tuple(rules)).to_dict()
    model, description = load_checkpoint(
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", written)))
    )
    assert description.stage == "ptq" and description.recipe is not None and description.recipe.name == "first"
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))


def test_a_modelopt_checkpoint_computes_the_same(config_file, images, tmp_path):
    """timm's names, and quantizers without an underscore; their other buffers are left."""
    twin = quantize(small_swin(), RECIPES["gemm"])
    find_ranges(twin, [images])
    state = {
        key.replace("._input_q", ".input_q").replace("._weight_q", ".weight_q"): v
        for key, v in twin.state_dict().items()
    }
    state["layers.0.blocks.0.norm1.input_quantizer._amax"] = torch.tensor(3.0)  # it quantizes what normalizations read
    state["layers.0.blocks.0.attn.qkv.input_quantizer._pre_quant_scale"] = torch.ones(16)
    torch.save(state, tmp_path / "theirs.pth")
    model, _ = load_checkpoint(
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", "gemm")))
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images))


def test_smoothquants_scales_are_refused(config_file, images, tmp_path):
    """Without them the weights, which are divided by them, would give nonsense."""
    twin = quantize(small_swin(), RECIPES["gemm"])
    find_ranges(twin, [images])
    scale = "layers.0.blocks.0.attn.qkv.input_quantizer._pre_quant_scale"
    torch.save({**twin.state_dict(), scale: torch.full((16,), 0.5)}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=f"{scale} scales what the layer reads .SmoothQuant."):
        convert(load_config(config_file, settings(config_file, tmp_path / "theirs.pth", "gemm")))


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
