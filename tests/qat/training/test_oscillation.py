"""Oscillating weights, beside a count in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qswin.qat.quant.layers import QuantLinear
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe, Rule
from qswin.qat.training.oscillation import MOMENTUM, Oscillations, levels


def layer_of(start: list[float]) -> QuantLinear:
    """One output channel of range 127, so that a weight is its own level."""
    linear = nn.Linear(len(start), 1)
    linear.weight.data[:] = torch.tensor(start)
    recipe = Recipe("x", (Rule("fc", quantize=True),))
    layer = QuantLinear(linear, "fc", recipe.quantizer)
    for quantizer in quantizers(layer):
        quantizer._amax.fill_(127.0)
        quantizer.enable()
    return layer


def brute_force(path: list[int]) -> float:
    """The frequency of one weight that took these levels."""
    frequency, last = 0.0, 0
    for before, now in zip(path, path[1:], strict=False):
        change = int(np.sign(now - before))
        frequency += MOMENTUM * ((change * last < 0) - frequency)
        last = change or last
    return frequency


@given(st.lists(st.lists(st.integers(-5, 5), min_size=3, max_size=3), min_size=2, max_size=30))
@settings(max_examples=30)
def test_frequencies_are_those_of_a_count_by_hand(steps):
    layer = layer_of(steps[0])
    oscillations = Oscillations(layer, threshold=1.0)
    for step in steps[1:]:
        layer.weight.data[:] = torch.tensor(step)
        oscillations.update()
    expected = [brute_force(list(path)) for path in zip(*steps, strict=True)]
    assert oscillations.known[0].frequency.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert layer.weight.flatten().tolist() == steps[-1]
    assert oscillations.shares() == {"oscillating": sum(f > 0.005 for f in expected) / 3, "frozen": 0.0}


def test_a_weight_that_oscillates_stays_where_it_mostly_was():
    layer = layer_of([3.0, 3.0, -2.0])
    oscillations = Oscillations(layer, threshold=0.015)  # two oscillations within a few steps
    for step in range(6):
        layer.weight.data[:] = torch.tensor([3.0 + step % 2, 3.0 + step, -2.0])
        oscillations.update()
    assert oscillations.known[0].frozen.tolist() == [[True, False, False]]
    assert layer.weight.tolist() == [[3.0, 8.0, -2.0]]
    layer.weight.data[:] = torch.tensor([[9.0, 9.0, 9.0]])
    oscillations.update()
    assert layer.weight.tolist() == [[3.0, 9.0, 9.0]]
    assert oscillations.shares()["frozen"] == pytest.approx(1 / 3)


def test_what_cannot_oscillate_says_so():
    with pytest.raises(ValueError, match="freeze_oscillating=2 is not a frequency"):
        Oscillations(layer_of([1.0]), threshold=2)
    with pytest.raises(ValueError, match="no weight is quantized"):
        Oscillations(nn.Linear(2, 2), threshold=0.5)


def test_a_frozen_weight_keeps_its_level_when_its_range_moves():
    layer = layer_of([3.0, 1.0])
    oscillations = Oscillations(layer, threshold=0.0)
    for value in (4.0, 3.0):
        layer.weight.data[0, 0] = value
        oscillations.update()
    layer._weight_quantizer._amax.fill_(254.0)
    oscillations.update()
    assert layer.weight.tolist() == [[6.0, 1.0]]
    assert levels(layer._weight_quantizer, layer.weight)[0, 0] == 3
