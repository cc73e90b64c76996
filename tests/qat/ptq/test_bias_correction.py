"""Bias correction against the float model's means."""

import copy
import dataclasses

import torch

from qswin.qat.ptq.bias_correction import channel_means, correct_biases
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.blocks import block_output
from qswin.qat.quant.layers import QuantConv2d, QuantLinear
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import disable, quantize
from tests.helpers import small_swin


def low_bit_twin(images):
    twin = quantize(small_swin(), dataclasses.replace(RECIPES["full"], weight_format="int3")).eval()
    find_ranges(twin, [images])
    return twin


def test_every_layer_has_the_float_models_means(images):
    """3-bit weights shift the means of most channels; afterwards none of a layer with a bias is shifted."""
    twin = low_bit_twin(images)
    teacher = copy.deepcopy(twin)
    disable(teacher)
    before = copy.deepcopy(twin)
    correct_biases(twin, images.split(2))
    names = [n for n, m in twin.named_modules() if isinstance(m, QuantLinear | QuantConv2d) and m.bias is not None]
    assert len(names) >= 18
    shifts = {}
    for name in names:
        expected = channel_means(teacher.get_submodule(name), teacher, images)
        found = [channel_means(model.get_submodule(name), model, images) for model in (before, twin)]
        shifts[name] = [float((means - expected).abs().max()) for means in found]
    assert max(after for _, after in shifts.values()) < 2e-5
    assert min(shifted for shifted, _ in shifts.values()) > 2e-4


def test_means_are_those_of_each_channel(images):
    twin = low_bit_twin(images)
    conv, linear = twin.get_submodule("patch_embed.proj"), twin.get_submodule("head.fc")
    pixels = block_output(twin, conv, images).double()
    expected = torch.stack([pixels[:, channel].mean() for channel in range(pixels.shape[1])])
    torch.testing.assert_close(channel_means(conv, twin, images).double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(channel_means(linear, twin, images), twin(images).mean(0))


def test_a_layer_without_bias_keeps_none(images):
    twin = low_bit_twin(images)
    correct_biases(twin, [images])
    assert twin.get_submodule("layers.1.downsample.reduction").bias is None
