"""From a stream of activations to one symmetric range: max, percentile, mse, entropy.

A `Histogram` is filled in one pass and serves all four. Its bins are powers of two wide, so a range that grows folds
whole bins together: the counts do not depend on how the images were cut into batches, on their order, or on how they
were spread over ranks.
"""

from collections.abc import Callable

import numpy as np

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
            raise ValueError(f"an activation is {amax}: no range can be taken from it")
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


def max_range(histogram: Histogram, bits: int = 8) -> float:
    """The largest |x|."""
    return histogram.amax


def percentile_range(histogram: Histogram, bits: int = 8, percentile: float = 99.99) -> float:
    """The value that `percentile` per cent of all |x| do not exceed, to one bin's width."""
    cumulative = np.cumsum(histogram.counts)
    reached = int(np.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
    return min(histogram.amax, float(histogram.edges[reached + 1]))


def mse_range(histogram: Histogram, bits: int = 8, candidates: int = 128) -> float:
    """The clipping range with the least mean squared quantization error, among even steps up to amax."""
    used = np.flatnonzero(histogram.counts)
    centres, counts = (used + 0.5) * histogram.bin_width, histogram.counts[used]
    centres = np.minimum(centres, histogram.amax)
    qmax = 2 ** (bits - 1) - 1

    def error(amax: float) -> float:
        step = amax / qmax
        return float(counts @ (np.minimum(np.rint(centres / step), qmax) * step - centres) ** 2)

    ranges = histogram.amax * np.arange(1, candidates + 1) / candidates
    return float(min(ranges, key=error))


def entropy_range(histogram: Histogram, bits: int = 8, bins: int = 2048, start_bin: int = 128) -> float:
    """TensorRT's entropy calibration: the range whose quantized distribution has the least KL divergence.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017. For every i from `start_bin` to `bins`, P is the first i bins with
    everything beyond added to the last of them, Q is the same i bins merged into 2**(bits - 1) levels and spread evenly
    over those that are not empty. As in TensorRT, the first bin's count is replaced by the second's, so that a crowd of
    zeros does not decide, and ties go to the wider range.

    Spread evenly, Q is constant within a level, so KL(P, Q) = sum_j p_j log p_j - sum_k P_k log q_k needs only prefix
    sums: 2**(bits - 1) terms a candidate instead of i.
    """
    counts = histogram.rebinned(bins)
    counts[0] = counts[1]
    divergences = [_kl_divergence(counts, i, 2 ** (bits - 1)) for i in range(start_bin, bins + 1)]
    best = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return histogram.amax * (best + start_bin) / bins


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


CALIBRATORS: dict[str, Callable[..., float]] = {
    "max": max_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}


def check_calibrator(calibrator: str) -> None:
    """Raises ValueError unless `calibrator` is a key of CALIBRATORS or "percentile:P" with 0 < P <= 100."""
    name, _, argument = calibrator.partition(":")
    if name not in CALIBRATORS or (argument and name != "percentile"):
        raise ValueError(f"calibrator {calibrator!r} is not known; choose {', '.join(CALIBRATORS)} or percentile:99.9")
    try:
        valid = 0 < float(argument or 100) <= 100
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"calibrator {calibrator!r}: the percentile must lie in (0, 100]")


def find_range(histogram: Histogram, calibrator: str, bits: int = 8) -> float:
    """The symmetric range of a histogram's values, 0.0 when all of them are zero.

    Args:
        calibrator: a key of CALIBRATORS, or "percentile:99.9" for another percentile than 99.99.

    Raises:
        ValueError: there is no such calibrator.
    """
    check_calibrator(calibrator)
    if histogram.amax == 0:
        return 0.0
    name, _, argument = calibrator.partition(":")
    options = {"percentile": float(argument)} if argument else {}
    return CALIBRATORS[name](histogram, bits, **options)
