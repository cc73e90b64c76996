"""Equalization: the float function stays, ranges shrink, and INT8 is nearer to float on a model that is hard."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.harden import harden
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.ptq.equalization import channel_amax, channel_factors, equalizable, equalize
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.layers import QuantConv2d, QuantLinear
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.recipe import RECIPES, named_recipe
from qswin.qat.quant.rewrite import disable, enable, quantize
from qswin.qat.schema import CalibrationConfig
from tests.helpers import V1, V2, VARIANTS, small_swin

LONG = ("cvt", "swin-unet", "vit, ")  # how the names of variants begin that take ten seconds


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith(LONG)) for name in VARIANTS]
)
def test_the_float_model_computes_what_it_did(variant):
    """And its state dict, with the scales that could not be folded, loads into a fresh twin."""
    small = VARIANTS[variant]
    images = small.images()
    model = small.build()
    twin = quantize(model, RECIPES["gemm"])
    strengths = equalize(twin, [images])
    assert any(strengths.values())
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        find_ranges(twin, [images])
        fresh = quantize(small.build(), RECIPES["gemm"])
        fresh.load_state_dict(twin.state_dict())
        torch.testing.assert_close(fresh(images), twin(images), rtol=0, atol=0)


def test_factors_are_folded_where_a_twin_says_how():
    """In V1 all but fc2 and the head, which read what is not linear in a norm's or v's channels."""
    twin = quantize(small_swin(V1), RECIPES["gemm"])
    equalize(twin, [torch.randn(8, 3, 32, 32)])
    scaled = {q.site.rpartition(".")[2] for q in quantizers(twin) if q._pre_quant_scale is not None}
    assert scaled <= {"fc2", "head"} and "fc2" in scaled
    twin = quantize(small_swin(V2), RECIPES["gemm"])
    equalize(twin, [torch.randn(8, 3, 32, 32)])
    assert not any(q._pre_quant_scale is not None for q in quantizers(twin) if q.site.endswith("proj"))


def test_a_hard_model_is_nearer_to_float(images):
    model = harden(small_swin(V1), 100, seed=0)
    errors = {}
    for equal in (False, True):
        twin = quantize(model, RECIPES["attention"])
        calibrate(twin, [images], CalibrationConfig(equalize=equal))
        with torch.no_grad():
            errors[equal] = float((twin(images) - model(images)).square().mean())
    assert errors[True] < errors[False] / 5


def test_factors_by_hand():
    """amax ** -strength over its geometric mean; a channel that is never used counts as 1e-4 of the largest."""
    factors = channel_factors(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([2.0, 1.0, 0.5]))
    dead = channel_factors(torch.tensor([0.0, 1.0]), 1.0)
    torch.testing.assert_close(dead, torch.tensor([100.0, 0.01]))
    assert channel_factors(torch.tensor([1.0, 2.0]), 0.0) is None


def test_channels_are_measured_by_layer(images):
    twin = quantize(small_swin(V1), RECIPES["gemm"])
    layers = equalizable(twin)
    assert not any(isinstance(layer, QuantConv2d) for layer in layers)  # the patch embedding reads three channels
    found = channel_amax(twin, layers, [images[:1], images[1:]])
    seen = []
    handle = layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    twin(images)
    handle.remove()
    torch.testing.assert_close(found[layers[0]], seen[0].abs().flatten(0, -2).amax(0), rtol=1e-5, atol=1e-6)


def test_grouped_convolutions_are_divided_by_group():
    """In float and, channel by channel, against a convolution of scaled inputs."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 32, 3, groups=32))
    rules = {"rules": [{"sites": "*", "quantize": True}], "name": "all"}
    twin = quantize(model, type(RECIPES["gemm"]).from_dict(rules))
    x = torch.randn(4, 16, 8, 8) * torch.logspace(-1, 1, 16).view(-1, 1, 1)
    strengths = equalize(twin, [x])
    assert len(strengths) == 2 and strengths["0"] > 0
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_second_calibration_starts_from_the_plain_weights(images):
    twin = quantize(harden(small_swin(V1), 100, seed=0), RECIPES["gemm"])
    calibrate(twin, [images])
    once = copy.deepcopy(twin)
    calibrate(twin, [images])
    disable(twin, quiet=True)
    disable(once, quiet=True)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), once(images), rtol=1e-4, atol=1e-4)
    scales = [q._pre_quant_scale for q in quantizers(twin) if q._pre_quant_scale is not None]
    assert all(float(scale.max() / scale.min()) < 1e4 for scale in scales)


def test_weights_that_two_layers_share_are_left_alone(images):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)
            self.fc2.weight = self.fc1.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x))

    twin = quantize(Tied(), RECIPES["gemm"])
    assert isinstance(twin.fc1, QuantLinear) and not equalizable(twin)


def test_ranges_must_be_found_anew(images):
    twin = quantize(small_swin(V1), named_recipe("gemm"))
    find_ranges(twin, [images])
    equalize(twin, [images])
    stale = [q for q in quantizers(twin) if isinstance(q, TensorQuantizer) and not q._amax.isnan().any()]
    assert {q.site for q in stale} <= {"patch_embed", "patch_embed.weight"}
    with pytest.raises(ValueError, match="never calibrated"):
        enable(twin)


def test_errors_count_by_what_they_matter_to_the_prediction():
    """A channel that the head does not read is as large as can be and must not choose the strengths."""

    def strengths(read: float) -> dict[str, float]:
        torch.manual_seed(0)
        model = small_swin(V1)
        with torch.no_grad():
            for block in (module for module in model.modules() if type(module).__name__ == "SwinTransformerBlock"):
                block.mlp.fc2.weight[0] *= 1000 * read
        return equalize(quantize(model, RECIPES["gemm"]), [torch.randn(8, 3, 32, 32)])

    assert strengths(1.0) != strengths(0.0)


def test_random_numbers_go_on_as_if_none_had_been_drawn(images):
    twin = quantize(small_swin(V1), RECIPES["gemm"])
    state = torch.get_rng_state()
    equalize(twin, [images], seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_fp8_needs_no_factors(images):
    twin = quantize(small_swin(V1), named_recipe("gemm-fp8"))
    assert equalize(twin, [images]) == {}


def test_a_model_of_one_class_is_equalized_too():
    """Its prediction depends on nothing; errors count alike then."""
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    rules = {"rules": [{"sites": "*", "quantize": True}], "name": "all"}
    twin = quantize(model, type(RECIPES["gemm"]).from_dict(rules))
    x = torch.randn(64, 16) * torch.logspace(-2, 2, 16)
    assert any(equalize(twin, [x]).values())
