"""Calibration caches for implicit INT8, by TensorRT on a GPU or offline. The command `qswin calib-cache`."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from absl import logging
from tqdm import tqdm

from calib.batches import image_batches
from calib.build_cache import activation_ranges
from calib.cache import ALGORITHMS, format_cache, parse_cache, write_cache
from calib.files import write_json
from calib.folders import Sample, draw_samples, scan_folder
from calib.images import Preprocessing
from calib.trt_calibrator import BatchStream, make_calibrator
from trt.build import BuildOptions, build_network, check_possible
from trt.onnx_files import parse_metadata, properties, read_onnx
from trt.precision import is_quantized
from trt.version import find_backend


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a calibration cache for implicit INT8 (TensorRT before 11) of an FP32 ONNX file."
    parser.epilog = (
        "example:\n  qswin calib-cache --onnx runs/x/fp32.onnx --data DIR/train --cache runs/x/entropy2.cache"
        " --algorithm entropy2 --offline"
    )
    parser.add_argument("--onnx", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/train")
    parser.add_argument("--cache", required=True, type=Path, help="the file to write; its sidecar goes beside it")
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="entropy2")
    parser.add_argument("--images", type=int, default=512, help="drawn at random from the folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="decoding processes")
    parser.add_argument("--offline", action="store_true", help="from ONNX Runtime's activations; needs no GPU")
    parser.add_argument("--json", type=Path, help="write what the cache was made of here too")
    parser.add_argument("--tensorrt-version", default="8.6.0", help="that an offline cache is for")


def main(args: argparse.Namespace) -> None:
    model = read_onnx(args.onnx)
    metadata = parse_metadata(args.onnx, properties(model))
    if is_quantized(model):
        raise ValueError(f"{args.onnx}: has Q/DQ nodes, whose ranges are in the graph; export with --precision fp32")
    start = time.perf_counter()
    samples = draw_samples(scan_folder(metadata["task"], args.data), args.images, args.seed)
    batches, images = calibration_batches(samples, args, metadata), len(samples)
    if args.offline:
        data = format_cache(activation_ranges(model, batches, args.algorithm), args.tensorrt_version, args.algorithm)
    else:
        stream = BatchStream(batches, args.batch)
        data = calibrate_with_tensorrt(args.onnx, model, args.algorithm, args.batch, stream)
        images = stream.images
    details = {"images": images, "seed": args.seed, "offline": args.offline}
    write_cache(args.cache, data, args.onnx, details)
    _, _, ranges = parse_cache(data)
    if args.json:
        write_json(args.json, {"cache": str(args.cache), "ranges": len(ranges), "algorithm": args.algorithm, **details})
    logging.info("%s: %d ranges in %.1f s", args.cache, len(ranges), time.perf_counter() - start)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "trt.calib_cache")
