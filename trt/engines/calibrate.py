"""Calibration caches for implicit INT8, by TensorRT on a GPU or offline."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from absl import logging
from tqdm import tqdm

from qswin.calib.data.batches import image_batches, warn_of_skipped
from qswin.calib.data.folders import Sample, draw_samples, scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import check_replaceable, check_suffix, sidecar_path
from qswin.calib.trt_cache.cache_file import (
    KIND,
    SUFFIX,
    BoundTo,
    format_cache,
    parse_cache,
    version_number,
    write_cache,
)
from qswin.calib.trt_cache.native import BatchStream, make_calibrator
from qswin.calib.trt_cache.offline import activation_ranges
from qswin.trt.engines.network import build_network
from qswin.trt.engines.options import BuildOptions, check_possible
from qswin.trt.engines.version import find_tensorrt
from qswin.trt.graphs.files import check_interface, open_onnx, parse_metadata, properties
from qswin.trt.graphs.half_precision import is_quantized


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How a calibration cache is made.

    Attributes:
        algorithm: entropy2 or minmax.
        images: how many, drawn at random from the folder.
        batch_size: TensorRT calibrates full batches only.
        seed: of the drawing.
        workers: decoding processes; None for one a core.
        skip_unreadable: skip the files that cannot be read.
        offline_for: make the cache from ONNX Runtime's activations, for this TensorRT version, "8.6.0"; None for
            TensorRT's own cache.
        timeout: seconds that a run in ONNX Runtime may take; None for any number.

    Raises:
        ValueError: `offline_for` is not a version.
    """

    algorithm: str = "entropy2"
    images: int = 512
    batch_size: int = 16
    seed: int = 0
    workers: int | None = None
    skip_unreadable: bool = False
    offline_for: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.offline_for is not None:
            version_number(self.offline_for)


def make_cache(onnx: Path, data: Path, cache: Path, options: CacheOptions) -> dict[str, Any]:
    """Writes a calibration cache of an FP32 ONNX file, and its sidecar.

    Args:
        data: a folder of images.
        cache: the file to write; its name ends in .cache.

    Returns:
        What the cache was made of, and how many ranges it has.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the graph is quantized, an image cannot be read, or TensorRT has no calibrators or is missing.
    """
    check_suffix("--cache", cache, (SUFFIX,))
    check_replaceable(sidecar_path(cache), KIND)
    start, (model, digest) = time.perf_counter(), open_onnx(onnx)
    check_interface(onnx, model)
    metadata = parse_metadata(onnx, properties(model))
    if is_quantized(model):
        raise ValueError(f"{onnx}: has Q/DQ nodes, whose ranges are in the graph; export with --precision fp32")
    samples = draw_samples(scan_folder(metadata.task, data), options.images, options.seed)
    skipped: list[ImageFile] | None = [] if options.skip_unreadable else None
    batches = calibration_batches(samples, metadata.preprocessing, options, skipped)
    if options.offline_for is None:
        stream = BatchStream(batches, options.batch_size)
        content = calibrate_with_tensorrt(onnx, model, options.algorithm, options.batch_size, stream)
        images = stream.images
    else:
        content = format_cache(
            activation_ranges(onnx, model, batches, options.algorithm, timeout=options.timeout),
            options.offline_for,
            options.algorithm,
        )
        images = len(samples) - len(skipped or ())
    warn_of_skipped(skipped)
    details = {"images": images, "seed": options.seed, "offline": options.offline_for is not None}
    write_cache(cache, content, BoundTo(onnx.name, digest), details)
    ranges = len(parse_cache(content)[2])
    logging.info("%s: %d ranges in %.1f s", cache, ranges, time.perf_counter() - start)
    return {"ranges": ranges, "algorithm": options.algorithm, **details}


def calibration_batches(
    samples: Sequence[Sample], preprocessing: Preprocessing, options: CacheOptions, skipped: list[ImageFile] | None
) -> Iterator[np.ndarray]:
    """(N, 3, H, W) float32 each, with a progress bar on a terminal. `skipped` is as `image_batches` has it."""
    batches = image_batches(samples, preprocessing, options.batch_size, options.workers, skipped)
    steps = -(-len(samples) // options.batch_size)
    for batch in tqdm(batches, "calibrate", steps, disable=not sys.stderr.isatty()):
        yield batch.images


def calibrate_with_tensorrt(
    path: Path, model: onnx.ModelProto, algorithm: str, batch: int, stream: BatchStream
) -> bytes:
    """TensorRT's own cache. An engine is built on the way and thrown away, so the builder does not optimize it.

    Raises:
        ValueError: this TensorRT has no calibrators, there is no GPU, or an image could not be read.
    """
    options = BuildOptions(precision="int8", batch_sizes=(batch, batch, batch), level=0)
    tensorrt = find_tensorrt("tensorrt")
    if not tensorrt.can.implicit_int8:
        raise ValueError(
            f"{tensorrt} has no calibrators; use --offline for a cache of an older version, or Q/DQ graphs"
        )
    check_possible(path, model, options, tensorrt, calibrated=True)
    calibrator = make_calibrator(algorithm, stream)
    build_network(path, model, options, tensorrt, {}, calibrator)
    if stream.error is not None:
        raise stream.error
    return calibrator.read_calibration_cache()
