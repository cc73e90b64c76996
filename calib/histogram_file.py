"""The histograms that calibration leaves in a run's folder: what `qswin report` draws the ranges into."""

import dataclasses
import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qswin.calib.calibrators import BINS, Histogram
from qswin.calib.files import write_atomic

HISTOGRAMS = "histograms.npz"
BROKEN = (  # what NumPy raises over a damaged .npz
    *(ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What calibration saw at one quantizer, and how many bits the quantizer has."""

    histogram: Histogram
    bits: int


def save_histograms(path: Path, observations: Mapping[str, Observation]) -> None:
    """Writes {quantizer: what it saw} as a compressed .npz, atomically.

    Raises:
        OSError: it could not be written.
    """
    histograms = [observation.histogram for observation in observations.values()]
    data = io.BytesIO()
    np.savez_compressed(
        data,
        names=np.array(list(observations), dtype=np.str_),
        bits=np.array([observation.bits for observation in observations.values()], dtype=np.int64),
        amax=np.array([histogram.amax for histogram in histograms], dtype=np.float64),
        counts=np.array([histogram.counts for histogram in histograms], dtype=np.int64).reshape(-1, BINS),
    )
    write_atomic(path, data.getvalue())


def load_histograms(path: Path) -> dict[str, Observation]:
    """Reads what `save_histograms` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, or no such file.
    """
    data = io.BytesIO(path.read_bytes())
    try:
        with np.load(data, allow_pickle=False) as file:
            columns = [file[name] for name in ("names", "bits", "amax", "counts")]
    except BROKEN as error:
        raise ValueError(f"{path}: truncated, or no histograms; calibrate again") from error
    if not _valid(*columns):
        raise ValueError(f"{path}: holds no histograms; calibrate again")
    observations = {}
    for name, bits, amax, counts in zip(*columns, strict=True):
        histogram = Histogram()
        histogram.reserve(float(amax))
        if np.flatnonzero(counts)[-1:].tolist() != [int(amax / histogram.bin_width)]:
            raise ValueError(f"{path}: the largest value of {name} is not in its last bin; calibrate again")
        histogram.counts = counts
        observations[str(name)] = Observation(histogram, int(bits))
    return observations


def _valid(names: np.ndarray, bits: np.ndarray, amax: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the columns have the types, shapes and values of `save_histograms`'s."""
    kinds = [column.dtype.kind for column in (names, bits, amax, counts)]
    return (
        kinds == ["U", "i", "f", "i"]
        and {column.shape for column in (names, bits, amax)} == {(len(counts),)}
        and counts.shape == (len(counts), BINS)
        and bool(((bits >= 2) & (bits <= 8)).all() and (counts >= 0).all())
        and bool(((amax > 0) & np.isfinite(amax)).all())
    )
