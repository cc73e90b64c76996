"""A recipe's budget: what costs too much is left in float, and nothing else."""

import dataclasses

import pytest
from torch import nn

import qswin
from qswin.qat.ptq.automatic import costly_sites
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.ptq.verdict import Comparison
from qswin.qat.quant.quantizers import Mode, quantizers
from qswin.qat.quant.recipe import RECIPES, Recipe
from qswin.qat.quant.rewrite import quantize, recipe_of
from tests.helpers import VARIANTS, lively_swin

LOW = dataclasses.replace(RECIPES["auto"], weight_format="int6", activation_format="int4")


@pytest.mark.parametrize("variant", ["vit, class token", "swin-unet"])
def test_auto_leaves_what_costs_the_most(variant):
    """Of a model with three ranges that are far off it leaves these in float, and little else."""
    small = VARIANTS[variant]
    images = small.images()
    twin = quantize(small.build(), RECIPES["auto"])
    find_ranges(twin, [images])
    broken = [q for q in quantizers(twin) if q.site.endswith("fc2")][:2]
    broken += [q for q in quantizers(twin) if q.site.endswith("attn.v")][:1]
    comparison = Comparison(twin, [images])
    before = comparison.measure().kl
    for quantizer in broken:
        quantizer._amax *= 1e4
    budget = (before * comparison.measure().kl) ** 0.5
    left = costly_sites(comparison, budget)
    assert {q.site for q in broken} & set(left) and len(left) <= 6
    assert comparison.measure().kl <= budget


def test_calibration_keeps_the_budget_of_a_recipe(images):
    plain = quantize(lively_swin(), dataclasses.replace(LOW, budget=None))
    assert qswin.calibrate(plain, [images]) == len(images) and recipe_of(plain).in_float == ()
    half = Comparison(plain, [images]).measure().kl / 2
    twin = quantize(lively_swin(), dataclasses.replace(LOW, budget=half))
    qswin.calibrate(twin, [images])
    left = recipe_of(twin).in_float
    assert 0 < len(left) < 9 and Comparison(twin, [images]).measure().kl <= half
    assert not {quantizer.site for quantizer in quantizers(twin)} & set(left)
    assert all(quantizer.mode is Mode.QUANTIZING for quantizer in quantizers(twin))


def test_the_recipe_of_a_model_that_another_one_holds_is_found():
    twin = quantize(lively_swin(), LOW)
    assert recipe_of(nn.Sequential(nn.Identity(), twin)) is LOW
    with pytest.raises(ValueError, match="this Swin.* has no recipe; make it with qswin.quantize"):
        recipe_of(lively_swin())


@pytest.mark.parametrize("budget", [-0.1, float("nan")])
def test_a_budget_is_not_negative(budget):
    with pytest.raises(ValueError, match="a mean KL is wanted"):
        Recipe("mine", budget=budget)
