"""Scale migration changes nothing in float, and flattens outliers."""

import pytest
import torch

from qat.ptq import calibrate
from qat.recipe import named_recipe
from qat.rewrite import disable, quantize
from qat.smooth import channel_peaks, smooth, smooth_pairs
from tests.conftest import V2, small_swin


def outlier_swin() -> torch.nn.Module:
    """Two channels of each normalization are 60 times the others, as in trained transformers."""
    model = small_swin()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    for block in (block for stage in model.layers for block in stage.blocks):
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight.data[:2] *= 60
            linear.weight.data[:, :2] /= 60
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_float_model_stays_what_it_is(images, alpha):
    model = outlier_swin()
    twin = quantize(model, named_recipe("full"))
    assert smooth(twin, images.split(2), alpha) == 8  # two for each of four blocks
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=1e-3, atol=1e-3)


def test_outliers_are_flattened_and_int8_is_better(images):
    model = outlier_swin()
    expected = model(images).detach()
    errors, spreads = [], []
    for smoothed in (False, True):
        twin = quantize(model, named_recipe("gemm"))
        if smoothed:
            smooth(twin, [images])
        disable(twin)
        (peak,) = channel_peaks(twin, [smooth_pairs(twin)[0][1][0]], [images])
        spreads.append((peak.max() / peak.median()).item())
        calibrate(twin, [images])
        with torch.no_grad():
            errors.append((twin(images) - expected).square().mean().item())
    assert spreads[1] < spreads[0] / 4 and errors[1] < errors[0] / 2


def test_peaks_are_those_of_all_batches(images):
    twin = quantize(outlier_swin(), named_recipe("none"))
    layer = twin.layers[0].blocks[0].attn.qkv
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        twin(images)
    handle.remove()
    (peak,) = channel_peaks(twin, [layer], images.split(1))
    torch.testing.assert_close(peak, seen[0].abs().flatten(0, -2).amax(0))


def test_norms_that_come_after_have_no_pairs():
    assert smooth_pairs(quantize(small_swin(V2), named_recipe("full"))) == []
