"""Calibrators against brute force on the raw values."""

import dataclasses
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from qswin.calib import calibrators
from qswin.calib.calibrators import CALIBRATORS, Histogram, Parameter, calibrator, find_range, parse_calibrator
from qswin.calib.grid import FP8, UINT8, grid_of
from tests.helpers import filled

finite = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 200), elements=finite)


@given(arrays, st.integers(0, 200), st.randoms())
@settings(max_examples=100)
def test_counts_do_not_depend_on_batches_or_order(values, cut, rnd):
    shuffled = values.copy()
    rnd.shuffle(shuffled)
    whole, cut_up = filled(values), filled(shuffled[:cut], shuffled[cut:])
    assert (whole.counts == cut_up.counts).all()
    assert (whole.amax, whole.exponent) == (cut_up.amax, cut_up.exponent)


@given(arrays, arrays)
@settings(max_examples=100)
def test_merging_is_counting_everything_in_one_place(first, second):
    merged = filled(first)
    merged.merge(filled(second))
    assert (merged.counts == filled(first, second).counts).all()


@given(arrays)
@settings(max_examples=100)
def test_counts_are_numpys(values):
    histogram = filled(values)
    expected, _ = np.histogram(np.abs(values).astype(np.float64), histogram.edges)
    assert histogram.counts.sum() == values.size
    assert (histogram.counts == expected).all()
    assert histogram.amax == np.abs(values).max()


def test_a_growing_range_loses_no_count():
    chunks = [np.full(10, 10.0**power, np.float32) for power in range(-6, 7)]
    histogram = filled(*chunks)
    assert histogram.counts.sum() == 130 and histogram.amax == 1e6


def test_memory_does_not_grow_with_the_values_seen():
    """What adding allocates at its peak is a multiple of the chunk, and nothing of it is kept, however many come."""
    chunk, histogram = np.random.default_rng(0).normal(size=100_000).astype(np.float32), filled(np.ones(10))
    tracemalloc.start()
    try:
        histogram.add(chunk)
        kept, (_, peak) = tracemalloc.get_traced_memory()[0], tracemalloc.get_traced_memory()
        for scale in range(1, 50):
            histogram.add(chunk * scale)
        later, later_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert later < kept + chunk.nbytes / 10 and later_peak < peak + 2 * chunk.nbytes
    assert histogram.counts.sum() == 10 + 50 * chunk.size


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="a value is"):
        Histogram().add(np.array([1.0, value]))


def heavy_tail(seed: int, size: int = 20_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size).astype(np.float32)


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
def test_percentile_is_numpys_to_a_bin(percentile):
    values = np.abs(heavy_tail(0))
    histogram = filled(values)
    expected = np.quantile(values, percentile / 100, method="inverted_cdf")
    assert find_range(histogram, f"percentile:{percentile}") == pytest.approx(expected, abs=histogram.bin_width)


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_mse_is_the_best_of_a_brute_force_search(bits):
    values = np.abs(heavy_tail(1)).astype(np.float64)
    histogram = filled(values)
    qmax = 2 ** (bits - 1) - 1

    def error(amax: float) -> float:
        step = amax / qmax
        return np.mean((np.minimum(np.rint(values / step), qmax) * step - values) ** 2)

    best = min(error(values.max() * i / 128) for i in range(1, 129))
    assert error(find_range(histogram, "mse", grid_of(f"int{bits}"))) <= best * 1.001


def reference_divergence(counts: np.ndarray, i: int, levels: int) -> float:
    """KL(P, Q) bin by bin, as TensorRT's calibration was published, with SciPy's entropy."""
    level = np.digitize(range(i), np.linspace(0, i, levels + 1)) - 1
    level[counts[:i] == 0] = -1
    totals, sizes = np.zeros(levels), Counter(level)
    for index, count in zip(level, counts[:i], strict=True):
        if index >= 0:
            totals[index] += count
    q = np.array([totals[index] / sizes[index] if index >= 0 else 0.0 for index in level])
    p = counts[:i].copy()
    p[-1] += counts[i:].sum()
    return stats.entropy(p / p.sum(), q / q.sum())


@pytest.mark.parametrize("i", [128, 129, 500, 1023, 1024, 2047, 2048])
@pytest.mark.parametrize("bits", [8, 4])
def test_divergence_is_the_published_one(i, bits):
    counts = filled(heavy_tail(2)).rebinned(2048)
    expected = reference_divergence(counts, i, 2 ** (bits - 1))
    assert calibrators._kl_divergence(counts, i, 2 ** (bits - 1)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_entropy_takes_the_least_divergence_with_ties_to_the_wider_range():
    histogram = filled(heavy_tail(3, 5000))
    counts = histogram.rebinned(2048)
    counts[0] = counts[1]
    divergences = {i: reference_divergence(counts, i, 128) for i in range(128, 2049)}
    least = min(divergences.values())
    best = max(i for i, divergence in divergences.items() if np.isclose(divergence, least, rtol=1e-12))
    assert find_range(histogram, "entropy") == pytest.approx(histogram.amax * best / 2048)


def test_entropy_ignores_a_crowd_of_zeros():
    values = np.abs(heavy_tail(4))
    assert find_range(filled(values, np.zeros(10**6)), "entropy") == find_range(filled(values, np.zeros(10)), "entropy")


@given(st.integers(0, 1000), st.integers(-20, 20), st.sampled_from(sorted(CALIBRATORS)))
@settings(max_examples=40)
def test_ranges_lie_within_the_data_and_scale_with_it(seed, exponent, calibrator):
    values = heavy_tail(seed, 2000)
    found, scaled = (find_range(filled(values * 2.0**e), calibrator) for e in (0, exponent))
    assert 0 < found <= np.abs(values).max()
    assert scaled == found * 2.0**exponent


def test_zeros_give_a_range_of_zero():
    assert find_range(filled(np.zeros(5)), "entropy") == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("best", r"calibrator 'best' is not known; choose max, percentile\[:PERCENTILE\], mse, entropy"),
        ("max:3", "calibrator 'max:3' is not known"),
        *((f"percentile:{text}", "must be above 0 and at most 100") for text in ("0", "x", "", "101", "nan")),
    ],
)
def test_unknown_calibrators_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        find_range(filled(np.ones(3)), name)


def test_the_least_squares_range_is_that_of_the_first_formula():
    """Bit for bit what the search gave when it stood apart from the weights': the least of 128 even steps."""
    for seed, bits in ((5, 8), (6, 4), (7, 3)):
        histogram = filled(heavy_tail(seed))
        used = np.flatnonzero(histogram.counts)
        centres, counts = (used + 0.5) * histogram.bin_width, histogram.counts[used]
        centres = np.minimum(centres, histogram.amax)
        qmax = 2 ** (bits - 1) - 1

        def error(amax, centres=centres, counts=counts, qmax=qmax):
            step = amax / qmax
            return float(counts @ (np.minimum(np.rint(centres / step), qmax) * step - centres) ** 2)

        expected = float(min(histogram.amax * np.arange(1, 129) / 128, key=error))
        assert find_range(histogram, "mse", grid_of(f"int{bits}")) == expected


def test_a_calibrator_from_outside_is_found_by_name():
    try:

        @calibrator("sigmas", Parameter("count", low=0, high=10))
        def sigmas(histogram, grid, count=3.0):
            centres = (np.arange(histogram.counts.size) + 0.5) * histogram.bin_width
            return min(histogram.amax, count * float(np.sqrt(histogram.counts @ centres**2 / histogram.counts.sum())))

        values = np.random.default_rng(0).normal(size=20_000)
        assert find_range(filled(values), "sigmas:2") == pytest.approx(2, abs=0.05)
        assert find_range(filled(values), "sigmas") == pytest.approx(3, abs=0.05)
        with pytest.raises(ValueError, match="the count must be above 0 and at most 10"):
            parse_calibrator("sigmas:11")
        with pytest.raises(ValueError, match="'sigmas' is already registered"):
            calibrator("sigmas")(sigmas)
    finally:
        CALIBRATORS.pop("sigmas", None)


def test_fp8_has_its_own_search_and_no_entropy():
    """Least squares over FP8's levels, by brute force; entropy is defined for even levels alone."""
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    values[0] = 40.0
    histogram = filled(values)
    ranges = histogram.amax * np.arange(1, 129) / 128
    errors = [np.square(FP8.nearest(values / (r / 448)) * (r / 448) - values).sum() for r in ranges]
    found = find_range(histogram, "mse", FP8)
    error = np.square(FP8.nearest(values / (found / 448)) * (found / 448) - values).sum()
    assert error <= 1.01 * min(errors)
    with pytest.raises(ValueError, match="'entropy' is for evenly spaced levels, not for fp8; choose max or mse"):
        find_range(histogram, "entropy", FP8)


def test_entropy_of_unsigned_levels_is_that_of_twice_as_many():
    """uint8 has 256 levels from 0, int8 128: with half the values' resolution the best range is another."""
    values = np.random.default_rng(1).exponential(1.0, 20000).astype(np.float32) ** 2
    histogram = filled(values)
    nine = dataclasses.replace(grid_of("int8"), name="int9", bits=9, qmin=-256, qmax=255)
    assert find_range(histogram, "entropy", UINT8) == find_range(histogram, "entropy", nine)
    assert find_range(histogram, "entropy", UINT8) != find_range(histogram, "entropy", grid_of("int8"))
