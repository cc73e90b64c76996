"""Twins against timm's own modules; what the rewritten model lets torch do."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.layers import QuantAdd, QuantConv2d, QuantLinear, QuantMatMul
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule, named_recipe
from qswin.qat.quant.rewrite import clip_weights, disable, enable, fold_biases, quantize
from tests.helpers import SMALL, V1, V2, small_swin

SHAPES = [
    {},
    {"img_size": 36},  # 18x18 tokens do not fill windows of 4: padding, masks and cropping
    {"img_size": 40, "window_size": 5, "depths": [1, 2, 1], "num_heads": [1, 2, 4]},
    {"always_partition": True, "img_size": 24, "window_size": 8},
]


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("settings", SHAPES)
@torch.no_grad()
def test_a_twin_computes_what_timm_computes(name, settings):
    model = small_swin(name, **settings)
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    twin = quantize(model, named_recipe("full"))
    expected = model(x)
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-6)
    fold_biases(twin)
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-6)


def test_a_twin_has_timms_gradients(swin, images):
    twin = quantize(swin, named_recipe("full"))
    for model in (swin, twin):
        model(images).square().sum().backward()
    expected = dict(swin.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)


def test_the_original_is_left_alone(swin, images):
    before = swin(images)
    twin = quantize(swin, named_recipe("full"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(swin(images), before)


def test_state_dict_keys_are_timms_plus_the_ranges(swin):
    keys, float_keys = (set(m.state_dict()) for m in (quantize(swin, named_recipe("full")), swin))
    assert float_keys <= keys
    assert {key.rsplit(".", 1)[1] for key in keys - float_keys} == {"_amax"}
    assert "layers.0.blocks.1.attn.qkv._input_quantizer._amax" in keys
    assert "layers.0.blocks.1.attn.qkv._weight_quantizer._amax" in keys


def test_every_site_of_the_design_is_there(swin):
    sites = {quantizer.site for quantizer in quantizers(quantize(swin, named_recipe("full")))}
    block = "layers.1.blocks.1"
    activations = [f"{block}.attn.{site}" for site in ("qkv", "q", "k", "probs", "v", "proj")]
    activations += [f"{block}.mlp.fc1", f"{block}.mlp.fc2", "layers.1.downsample.reduction", "patch_embed", "head"]
    activations += [f"{block}.{add}.{side}" for add in ("add1", "add2") for side in ("shortcut", "branch")]
    assert set(activations) <= sites
    assert {f"{site}.weight" for site in ("head", "patch_embed", f"{block}.mlp.fc1", f"{block}.attn.qkv")} <= sites


def test_every_quantizer_does_what_its_layer_says(quantized, images):
    """Each layer against its plain arithmetic with rounding written out."""

    def rounded(quantizer, x):
        grid = quantizer.spec.grid
        scale = quantizer.amax / grid.qmax
        return (x / scale).round().clamp(grid.qmin, grid.qmax) * scale

    seen = {}

    def check(module, inputs, output):
        first = rounded(module._input_quantizer, inputs[0])
        if isinstance(module, QuantLinear):
            expected = nn.functional.linear(first, rounded(module._weight_quantizer, module.weight), module.bias)
        elif isinstance(module, QuantConv2d):
            expected = nn.functional.conv2d(
                first, rounded(module._weight_quantizer, module.weight), module.bias, module.stride
            )
        elif isinstance(module, QuantMatMul):
            expected = first @ rounded(module._other_quantizer, inputs[1])
        else:
            expected = first + rounded(module._other_quantizer, inputs[1])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        seen[type(module)] = seen.get(type(module), 0) + 1

    for module in quantized.modules():
        if isinstance(module, QuantLinear | QuantConv2d | QuantMatMul | QuantAdd):
            module.register_forward_hook(check)
    with torch.no_grad():
        quantized(images)
    assert seen == {QuantLinear: 4 * 4 + 1 + 1, QuantConv2d: 1, QuantMatMul: 8, QuantAdd: 8}


def test_quantized_output_is_near_and_nearer_with_more_bits(images):
    model = small_swin()
    errors = []
    for bits in (8, 6, 4):
        twin = quantize(
            model, dataclasses.replace(RECIPES["full"], weight_format=f"int{bits}", activation_format=f"int{bits}")
        )
        find_ranges(twin, [images])
        with torch.no_grad():
            errors.append((twin(images) - model(images)).abs().mean() / model(images).abs().mean())
    assert errors[0] < 0.05 and errors[0] < errors[1] < errors[2]


def test_off_is_float_again(quantized, images):
    disable(quantized)
    with torch.no_grad():
        torch.testing.assert_close(quantized(images), small_swin()(images))


def test_uncalibrated_models_do_not_quantize(swin):
    twin = quantize(swin, named_recipe("gemm"))
    with pytest.raises(ValueError, match="patch_embed: its range was never calibrated"):
        enable(twin)


def test_clipping_weights_changes_nothing_but_the_weights(quantized, images):
    linear = quantized.layers[0].blocks[0].mlp.fc1
    linear._weight_quantizer._amax *= 0.5
    with torch.no_grad():
        before = quantized(images)
        clip_weights(quantized)
        assert torch.equal(quantized(images), before)
    assert (linear.weight.abs() <= linear._weight_quantizer._amax * 1.0001).all()


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_compile_and_export_trace_it_whole(quantized, images, dynamic):
    with torch.no_grad():
        expected = quantized(images)
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(images), expected)
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        exported = torch.export.export(quantized, (images,), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(images), expected)
        if dynamic:
            torch.testing.assert_close(exported(images[:3]), quantized(images[:3]))


def test_a_rule_may_be_undone_by_a_later_one(swin):
    """What `qswin search` writes: every site that the first rule names may stay in float."""
    rules = (Rule("head", quantize=True), Rule("qkv", quantize=True), Rule("head", quantize=False))
    sites = {quantizer.site for quantizer in quantizers(quantize(swin, Recipe("mixed", rules)))}
    assert sites and all("qkv" in site for site in sites)


def test_a_written_recipe_that_matches_nothing_is_an_error(swin):
    with pytest.raises(ValueError, match="'fc9' matches no site"):
        quantize(swin, Recipe("mine", (Rule("fc9", quantize=True),)))


def test_transformers_is_not_imported_for_a_swin():
    """It takes seconds, which only those who use CvT should pay."""
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from qswin import build_model, named_recipe, quantize\n"
        f"quantize(build_model({V1!r}, **{SMALL!r}), named_recipe('full'))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
