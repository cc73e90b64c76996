"""From a stream of values to one symmetric range: max, percentile, mse, entropy, and what else is registered.

A `Histogram` is filled in one pass and serves all of them. Its bins are powers of two wide, so a range that grows folds
whole bins together: the counts do not depend on how the images were cut into batches, on their order, or on how they
were spread over ranks.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from qswin.calib.grid import INT8, Grid

BINS = 1 << 14  # at least 8192 of them lie below the largest value: 4 or more for each of TensorRT's 2048
CHUNK = 1 << 16  # values counted at a time: the temporaries stay in the cache
SMALLEST_EXPONENT = -100  # a range below 2**-100 is none; 1 / bin_width must stay within float32


class Histogram:
    """Counts of |x| in `BINS` equal bins over [0, 2**exponent), where 2**exponent is just above the largest |x|.

    Attributes:
        counts: (BINS,) int64; bin i counts |x| in [i, i + 1) * bin_width.
        amax: the largest |x| seen; 0.0 before the first.
        exponent: the range's power of two.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.amax = 0.0
        self.exponent = SMALLEST_EXPONENT

    @property
    def bin_width(self) -> float:
        return 2.0**self.exponent / BINS

    @property
    def edges(self) -> np.ndarray:
        """(BINS + 1,) float64 bin edges."""
        return np.arange(BINS + 1) * self.bin_width

    def add(self, values: np.ndarray) -> None:
        """Counts an array of any shape. Raises ValueError when a value is NaN or infinite."""
        flat = np.asarray(values, dtype=np.float32).ravel()
        self.reserve(max(float(flat.max(initial=0.0)), -float(flat.min(initial=0.0))))
        for start in range(0, flat.size, CHUNK):
            magnitudes = np.abs(flat[start : start + CHUNK])
            magnitudes *= np.float32(1 / self.bin_width)
            self.counts += np.bincount(magnitudes.astype(np.intp), minlength=BINS)

    def reserve(self, amax: float) -> None:
        """Widens the range to hold `amax`, without losing a count.

        Raises:
            ValueError: `amax` is NaN or infinite.
        """
        if not np.isfinite(amax):
            raise ValueError(f"a value is {amax}: no range can be taken from it")
        self.amax = max(self.amax, amax)
        if self.amax > 0:
            self._widen(max(int(np.frexp(self.amax)[1]), self.exponent))

    def merge(self, other: "Histogram") -> None:
        """Adds another histogram's counts, another rank's for instance. `other` is widened to the common range."""
        self.reserve(other.amax)
        other.reserve(self.amax)
        self.counts += other.counts

    def _widen(self, exponent: int) -> None:
        fold = 1 << min(exponent - self.exponent, BINS.bit_length() - 1)
        if fold > 1:
            folded = self.counts.reshape(-1, fold).sum(axis=1)
            self.counts = np.concatenate([folded, np.zeros(BINS - folded.size, dtype=np.int64)])
        self.exponent = exponent

    def rebinned(self, bins: int) -> np.ndarray:
        """(bins,) float64 counts over [0, amax]; a bin that straddles a new edge is split in proportion."""
        below = np.concatenate([[0.0], np.cumsum(self.counts)])
        cumulative = np.interp(np.linspace(0.0, self.amax, bins + 1), self.edges, below)
        cumulative[-1] = below[-1]  # the last bin reaches past amax
        return np.diff(cumulative)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What may follow a calibrator's name, as in "percentile:99.9": a number above `low`, at most `high`.

    `name` is the argument of the calibrator's function that gets it.
    """

    name: str
    low: float
    high: float

    def parse(self, text: str) -> float | None:
        """The number that a text stands for, or None when it is not one in the bounds."""
        try:
            number = float(text)
        except ValueError:
            return None
        return number if self.low < number <= self.high else None


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """`find(histogram, grid)` gives the range of a histogram that holds more than zeros."""

    find: Callable[..., float]
    parameter: Parameter | None = None


CALIBRATORS: dict[str, Calibrator] = {}
Find = TypeVar("Find", bound=Callable[..., float])


def calibrator(name: str, parameter: Parameter | None = None) -> Callable[[Find], Find]:
    """Registers the function that it decorates under a name. Raises ValueError when the name is taken."""

    def register(find: Find) -> Find:
        if name in CALIBRATORS:
            raise ValueError(f"calibrator {name!r} is already registered; choose another name")
        CALIBRATORS[name] = Calibrator(find, parameter)
        return find

    return register


@calibrator("max")
def max_range(histogram: Histogram, grid: Grid) -> float:
    """The largest |x|."""
    return histogram.amax


@calibrator("percentile", Parameter("percentile", low=0, high=100))
def percentile_range(histogram: Histogram, grid: Grid, percentile: float = 99.99) -> float:
    """The value that `percentile` per cent of all |x| do not exceed, to one bin's width."""
    cumulative = np.cumsum(histogram.counts)
    reached = int(np.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
    return min(histogram.amax, float(histogram.edges[reached + 1]))


@calibrator("mse")
def mse_range(histogram: Histogram, grid: Grid, candidates: int = 128) -> float:
    """The clipping range with the least mean squared quantization error, among even steps up to amax."""
    used = np.flatnonzero(histogram.counts)
    centres, counts = (used + 0.5) * histogram.bin_width, histogram.counts[used]
    centres = np.minimum(centres, histogram.amax)
    ranges = histogram.amax * np.arange(1, candidates + 1) / candidates
    errors = squared_errors(centres, ranges.tolist(), grid, lambda squares: counts @ squares)
    return float(ranges[np.argmin(errors)])


def squared_errors(x: Any, ranges: Iterable[float], grid: Grid, total: Callable[[Any], Any]) -> list[Any]:
    """What `total` makes of the squared quantization errors of x under each range: the search behind "mse".

    Args:
        x: a NumPy array or a torch tensor.
        total: sums an array or tensor of x's shape over the values that share a range.
    """
    errors = []
    for amax in ranges:
        scale = grid.scale(amax)
        errors.append(total((grid.nearest(x / scale) * scale - x) ** 2))
    return errors


@calibrator("entropy")
def entropy_range(histogram: Histogram, grid: Grid, bins: int = 2048, start_bin: int = 128) -> float:
    """TensorRT's entropy calibration: the range whose quantized distribution has the least KL divergence.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017. For every i from `start_bin` (or qmax + 1, if that is more) to
    `bins`, P is the first i bins with everything beyond added to the last of them, Q is the same i bins merged into
    qmax + 1 levels and spread evenly over those that are not empty. As in TensorRT, the first bin's count is replaced
    by the second's, so that a crowd of zeros does not decide, and ties go to the wider range.

    Spread evenly, Q is constant within a level, so KL(P, Q) = sum_j p_j log p_j - sum_k P_k log q_k needs only prefix
    sums: qmax + 1 terms a candidate instead of i.

    Raises:
        ValueError: the grid's levels are not evenly spaced, as those of FP8.
    """
    if not grid.even:
        raise ValueError(f"calibrator 'entropy' is for evenly spaced levels, not for {grid.name}; choose max or mse")
    counts = histogram.rebinned(bins)
    counts[0] = counts[1]
    levels = int(grid.qmax) + 1
    first = max(start_bin, levels)
    divergences = [_kl_divergence(counts, i, levels) for i in range(first, bins + 1)]
    best = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return histogram.amax * (best + first) / bins


def _kl_divergence(counts: np.ndarray, i: int, levels: int) -> float:
    """KL(P, Q) of the first i bins against the same bins quantized to `levels`; infinite where Q misses some of P."""
    outliers = counts[i:].sum()
    q = counts[:i]
    p = q.copy()
    p[-1] += outliers
    if p[-1] > 0 and q[-1] == 0:
        return np.inf
    starts = np.unique(np.ceil(np.arange(levels) * i / levels).astype(int))
    q_level = np.add.reduceat(q, starts)
    q_bins = np.add.reduceat((q > 0).astype(np.float64), starts)
    p_level = np.add.reduceat(p, starts)
    filled = q_bins > 0
    q_total, p_total = q.sum(), p.sum()
    positive = p[p > 0]
    entropy = (positive * np.log(positive)).sum()
    cross = (p_level[filled] * np.log(q_level[filled] / q_bins[filled])).sum()
    return (entropy - cross) / p_total - np.log(p_total) + np.log(q_total)


def parse_calibrator(text: str) -> tuple[Calibrator, dict[str, float]]:
    """The calibrator that a text such as "mse" or "percentile:99.9" names, and its arguments.

    Raises:
        ValueError: there is no such calibrator, or its parameter is missing, out of bounds or not a number.
    """
    name, colon, argument = text.partition(":")
    found = CALIBRATORS.get(name)
    if found is None or (colon and found.parameter is None):
        names = [
            key if c.parameter is None else f"{key}[:{c.parameter.name.upper()}]" for key, c in CALIBRATORS.items()
        ]
        raise ValueError(f"calibrator {text!r} is not known; choose {', '.join(names)}")
    if found.parameter is None or not colon:
        return found, {}
    number = found.parameter.parse(argument)
    if number is None:
        low, high = found.parameter.low, found.parameter.high
        raise ValueError(f"calibrator {text!r}: the {found.parameter.name} must be above {low:g} and at most {high:g}")
    return found, {found.parameter.name: number}


def find_range(histogram: Histogram, calibrator: str, grid: Grid = INT8) -> float:
    """The symmetric range of a histogram's values, 0.0 when all of them are zero.

    Args:
        calibrator: a key of CALIBRATORS, with its parameter if need be: "percentile:99.9".
        grid: the number format; "mse" and "entropy" depend on it.

    Raises:
        ValueError: there is no such calibrator.
    """
    found, arguments = parse_calibrator(calibrator)
    return 0.0 if histogram.amax == 0 else found.find(histogram, grid, **arguments)
