"""Calibration caches for implicit INT8, by TensorRT on a GPU or offline. The command `qswin calib-cache`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import Sample
from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.native import BatchStream, make_calibrator
from qswin.trt.engines.build import BuildOptions, build_network, check_possible
from qswin.trt.engines.version import find_backend


def calibration_batches(
    samples: Sequence[Sample], args: argparse.Namespace, metadata: dict[str, Any]
) -> Iterator[np.ndarray]:
    """The images, preprocessed as the model wants them, with a progress bar on a terminal."""
    batches = image_batches(samples, Preprocessing(**metadata["preprocessing"]), args.batch, args.workers)
    steps = -(-len(samples) // args.batch)
    for batch in tqdm(batches, "calibrate", steps, disable=not sys.stderr.isatty()):
        yield batch.images


def calibrate_with_tensorrt(path: Path, model: onnx.ModelProto, algorithm: str, batch: int, stream: BatchStream) -> bytes:
    """TensorRT's own cache. An engine is built on the way and thrown away, so the builder does not optimize it.

    Raises:
        ValueError: this TensorRT has no calibrators, there is no GPU, or an image could not be read.
    """
    options = BuildOptions(precision="int8", profile=(batch, batch, batch), level=0)
    backend = find_backend("tensorrt")
    if not backend.can.implicit_int8:
        raise ValueError(f"{backend} has no calibrators; use --offline for a cache of an older version, or Q/DQ graphs")
    check_possible(path, model, options, backend, calibrated=True)
    calibrator = make_calibrator(algorithm, stream)
    build_network(path, model, options, backend, {}, calibrator)
    if stream.error is not None:
        raise stream.error
    return calibrator.read_calibration_cache()
