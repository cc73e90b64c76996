"""Block-wise reconstruction: it lowers what 4 bits cost, and touches nothing but the blocks."""

import dataclasses

import pytest
import torch

from qswin.qat.ptq import reconstruction
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.ptq.reconstruction import reconstruct
from qswin.qat.quant.blocks import block_arguments, block_output, blocks
from qswin.qat.quant.quantizers import Mode, quantizers
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import quantize
from qswin.qat.schema import CalibrationConfig
from tests.helpers import VARIANTS, lively_swin

LOW = dataclasses.replace(RECIPES["full"], weight_format="int4", activation_format="int4", weight_calibrator="mse")


def test_what_is_captured_is_what_flows(images):
    """A block's input is the output of the block before it in its stage, and the end is the model's own."""
    model = quantize(lively_swin(), RECIPES["none"])
    first, second, *_ = blocks(model)
    torch.testing.assert_close(block_arguments(model, second, images)[0], block_output(model, first, images))
    torch.testing.assert_close(first(*block_arguments(model, first, images)), block_output(model, first, images))
    assert not model._forward_hooks and not second._forward_pre_hooks


def test_it_lowers_the_error_on_other_images():
    model = lively_swin()
    generator = torch.Generator().manual_seed(5)
    batches = list(torch.randn(32, 3, 32, 32, generator=generator).split(8))
    others = torch.randn(32, 3, 32, 32, generator=generator)
    twin = quantize(model, LOW)
    find_ranges(twin, batches)
    kept = {name: value.clone() for name, value in twin.state_dict().items() if "layers" not in name}
    expected = model(others).detach()
    before = (twin(others) - expected).square().mean().item()
    shares = reconstruct(twin, batches, steps=40, lr=1e-3, range_lr=1e-2)
    after = (twin(others) - expected).square().mean().item()
    assert len(shares) == len(blocks(twin)) and max(shares) < 1 and after < 0.8 * before
    assert not twin.training
    for quantizer in quantizers(twin):
        assert quantizer.mode is Mode.QUANTIZING and quantizer._log_gain is None and quantizer.keep_float == 0
    for name, value in kept.items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("variant", ["cvt", "swin-unet"])
def test_blocks_that_take_more_than_tokens_and_models_of_pixels_are_trained_too(variant, images):
    twin = quantize(VARIANTS[variant].build(), LOW)
    find_ranges(twin, [images])
    shares = reconstruct(twin, images.split(2), steps=20, lr=1e-3, range_lr=1e-2)
    assert len(shares) == len(blocks(twin)) and max(shares) < 1


def test_half_of_the_activations_may_stay_in_float_in_training_alone(images):
    twin = quantize(lively_swin(), LOW)
    find_ranges(twin, [images])
    seen = set()
    for quantizer in quantizers(twin):
        quantizer.register_forward_pre_hook(lambda module, _: seen.add((module.training, module.keep_float)))
    reconstruct(twin, [images], steps=1, lr=1e-3, range_lr=1e-2)
    assert seen == {(False, 0.0), (True, 0.5)}


def test_what_has_no_weight_is_not_trained(images, monkeypatch):
    twin = quantize(lively_swin(), LOW)
    find_ranges(twin, [images])
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    monkeypatch.setattr(reconstruction, "fisher_weights", lambda *_: [torch.zeros(())])
    reconstruct(twin, [images], steps=2, lr=1e-3, range_lr=1e-2)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_same_seed_gives_the_same_model(images):
    """Whatever the state of torch's own random numbers, which go on as if nothing had been drawn."""
    options = CalibrationConfig(reconstruct_steps=2, reconstruct_lr=1e-3)
    states = []
    for start, seed in ((1, 7), (2, 7), (2, 8)):
        twin = quantize(lively_swin(), LOW)
        torch.manual_seed(start)
        expected = torch.get_rng_state()
        calibrate(twin, [images], options, seed=seed)
        assert torch.equal(torch.get_rng_state(), expected)
        states.append(twin.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())
