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
from qswin.calib.grid import grid_of
from qswin.calib.reading import read_regular

HISTOGRAMS = "histograms.npz"
LARGEST = 1 << 30  # bytes, unpacked
BROKEN = (  # what NumPy raises over a damaged .npz
    *(ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


@dataclasses.dataclass(frozen=True)
class Observation:
    """What calibration saw at one quantizer, and the name of the quantizer's number format."""

    histogram: Histogram
    format: str


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
        formats=np.array([observation.format for observation in observations.values()], dtype=np.str_),
        amax=np.array([histogram.amax for histogram in histograms], dtype=np.float64),
        counts=np.array([histogram.counts for histogram in histograms], dtype=np.int64).reshape(-1, BINS),
    )
    write_atomic(path, data.getvalue())


def load_histograms(path: Path) -> dict[str, Observation]:
    """Reads what `save_histograms` wrote, now or when it wrote the number of bits instead of the format's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, or not such a file, or a format in it is not registered.
    """
    data = io.BytesIO(read_regular(path, LARGEST))
    try:
        if sum(member.file_size for member in zipfile.ZipFile(data).infolist()) > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB when unpacked")
        with np.load(data, allow_pickle=False) as file:
            formats = file["formats"] if "formats" in file else _formats_of(file["bits"])
            columns = [file["names"], formats, file["amax"], file["counts"]]
    except BROKEN as error:
        raise ValueError(f"{path}: truncated, or not a file of histograms; calibrate again") from error
    if not _valid(*columns):
        raise ValueError(f"{path}: not a file of histograms; calibrate again")
    observations = {}
    for name, format_name, amax, counts in zip(*columns, strict=True):
        try:
            grid_of(str(format_name))
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}, register it, or calibrate again") from error
        histogram = Histogram()
        histogram.reserve(float(amax))
        if np.flatnonzero(counts)[-1:].tolist() != [int(amax / histogram.bin_width)]:
            raise ValueError(f"{path}: the largest value of {name} is not in its last bin; calibrate again")
        histogram.counts = counts
        observations[str(name)] = Observation(histogram, str(format_name))
    return observations


def _formats_of(bits: np.ndarray) -> np.ndarray:
    """The names of the integer formats of a file from before formats had names."""
    return np.array([f"int{number}" for number in bits.tolist()], dtype=np.str_)


def _valid(names: np.ndarray, formats: np.ndarray, amax: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the columns have the types, shapes and values of `save_histograms`'s."""
    kinds = [column.dtype.kind for column in (names, formats, amax, counts)]
    return (
        kinds == ["U", "U", "f", "i"]
        and {column.shape for column in (names, formats, amax)} == {(len(counts),)}
        and counts.shape == (len(counts), BINS)
        and bool((counts >= 0).all())
        and bool(((amax > 0) & np.isfinite(amax)).all())
    )
