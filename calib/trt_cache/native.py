"""TensorRT's own implicit-INT8 calibrators, fed with image batches from disk. TensorRT before 11; no torch."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

BASE_CLASSES = {"entropy2": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


class BatchStream:
    """Feeds batches to Polygraphy's calibrator, one in memory at a time.

    TensorRT takes an exception for the end of the data and would calibrate on what came before, so it is kept in
    `error` for the caller to raise. A last batch that is not full is left out: TensorRT calibrates one shape.

    Attributes:
        images: how many were fed.
    """

    def __init__(self, batches: Iterable[np.ndarray], batch_size: int) -> None:
        self._batches, self._batch_size = batches, batch_size
        self.images = 0
        self.error: ValueError | None = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        try:
            for batch in self._batches:
                if len(batch) == self._batch_size:
                    self.images += len(batch)
                    yield {"input": np.ascontiguousarray(batch)}
        except ValueError as error:
            self.error = error


def make_calibrator(algorithm: str, stream: Iterable[dict[str, np.ndarray]] = (), cache: bytes | None = None) -> Any:
    """TensorRT's calibrator of that algorithm, through Polygraphy.

    Args:
        algorithm: entropy2 (IInt8EntropyCalibrator2) or minmax (IInt8MinMaxCalibrator).
        stream: what to calibrate on; nothing when there is a cache.
        cache: the content of a cache file to take the ranges from.
    """
    import tensorrt
    from polygraphy.backend.trt import Calibrator

    return Calibrator(stream, cache=cache and private_file(cache), BaseClass=getattr(tensorrt, BASE_CLASSES[algorithm]))


def private_file(data: bytes) -> IO[bytes]:
    """An open file without a name that holds `data`: Polygraphy writes to the file that it reads a cache from."""
    file = tempfile.TemporaryFile()
    file.write(data)
    file.flush()
    return file
