"""Quantized layers whose inputs' channels are scaled."""

import copy

import pytest
import torch
from torch import nn

from qswin.qat.quant.layers import channel_shape, undo_channel_scales
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe, Rule
from qswin.qat.quant.rewrite import quantize


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 6), (3, 5, 8)),
        (nn.Conv2d(8, 6, 3), (2, 8, 5, 5)),
        (nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5)),
    ],
    ids=["linear", "convolution", "groups", "depthwise"],
)
def test_scales_that_the_weight_takes_back_leave_the_function(layer, shape):
    twin = quantize(nn.Sequential(layer), Recipe("all", (Rule("*", quantize=True),)))
    x = torch.randn(shape)
    twin[0]._input_quantizer._pre_quant_scale = torch.rand(channel_shape(twin[0])) + 0.5
    expected, unscaled = twin(x), layer(x)
    undone = copy.deepcopy(twin)
    undo_channel_scales(undone)
    assert all(quantizer._pre_quant_scale is None for quantizer in quantizers(undone))
    torch.testing.assert_close(undone(x), expected)
    assert not torch.allclose(expected, unscaled, atol=1e-3)
    torch.testing.assert_close(twin(x), expected)  # its copy has a weight of its own
