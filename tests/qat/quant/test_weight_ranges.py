"""Ranges of weights against brute force, the first formula, and one histogram a channel."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qswin.calib.calibrators import find_range
from qswin.calib.grid import INT8, grid_of
from qswin.qat.quant.weight_ranges import least_squares_amax, weight_ranges
from tests.helpers import filled


@given(hnp.arrays(np.float32, (3, 20), elements=st.floats(-9, 9, width=32, allow_subnormal=False)), st.integers(2, 8))
@example(np.full((3, 20), 1e-30, np.float32), 2)  # the squares are below float32's smallest number
@settings(max_examples=30)
def test_least_squares_ranges_are_no_worse_than_any_candidate(x, bits):
    """Errors counted in float64, for each channel on its own; the largest range is among the candidates."""
    qmax = 2 ** (bits - 1) - 1
    largest = np.abs(x).max(axis=1, keepdims=True)
    best = least_squares_amax(
        torch.from_numpy(x), torch.from_numpy(largest), grid_of(f"int{bits}").of_weights, candidates=8
    ).numpy()

    def error(channel: int, amax: float) -> float:
        scale = np.float64(amax) / qmax
        if scale == 0:
            return float((x[channel].astype(np.float64) ** 2).sum())
        return float(((np.clip(np.rint(x[channel] / scale), -qmax, qmax) * scale - x[channel]) ** 2).sum())

    assert best.shape == (3, 1) and (best <= largest).all()
    for channel in range(3):
        errors = [error(channel, share * largest[channel, 0]) for share in np.linspace(0.25, 1, 8)]
        assert error(channel, best[channel, 0]) <= min(errors) * 1.001 + 1e-6 * float(largest[channel, 0]) ** 2


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_least_squares_ranges_are_the_first_formulas_bit_for_bit(bits, axis):
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(bits)) ** 3
    grid = grid_of(f"int{bits}").of_weights
    amax = weight.abs().amax() if axis is None else weight.abs().amax(1, keepdim=True)
    x = weight / amax
    best, least = torch.ones_like(amax), torch.full_like(amax, float("inf"))
    for share in torch.linspace(0.25, 1.0, 64).tolist():
        scale = share / grid.qmax
        error = (
            (torch.clamp((x / scale).round_(), grid.qmin, grid.qmax).mul_(scale) - x).square_().sum_to_size(amax.shape)
        )
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    found = weight_ranges(weight, axis, "mse", grid)
    assert torch.equal(found, best * amax) and (bits == 8 or (found < amax).any())


@pytest.mark.parametrize("calibrator", ["percentile:99", "entropy"])
def test_other_calibrators_see_a_histogram_of_each_channel(calibrator):
    weight = torch.randn(4, 3, 5, 5)
    weight[1] = 0
    found = weight_ranges(weight, 0, calibrator, INT8.of_weights)
    assert found.shape == (4, 1, 1, 1)
    expected = [find_range(filled(channel.numpy()), calibrator) for channel in weight]
    assert found.flatten().tolist() == pytest.approx(expected) and found[1] == 0
    whole = weight_ranges(weight, None, calibrator, INT8.of_weights)
    assert whole.shape == () and whole.item() == pytest.approx(find_range(filled(weight.numpy()), calibrator))


def test_another_axis_has_its_own_ranges():
    weight = torch.randn(4, 6)
    for calibrator in ("max", "mse", "percentile:90"):
        across = weight_ranges(weight, 1, calibrator, INT8)
        assert across.shape == (1, 6) and torch.equal(across.T, weight_ranges(weight.T, 0, calibrator, INT8))
