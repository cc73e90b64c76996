"""`qswin calib-cache`."""

import argparse
import time
from pathlib import Path

from absl import logging

from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.calib.files import write_json
from qswin.calib.trt_cache.cache_file import ALGORITHMS, format_cache, parse_cache, write_cache
from qswin.calib.trt_cache.native import BatchStream
from qswin.calib.trt_cache.offline import activation_ranges
from qswin.trt.engines.calibrate import calibrate_with_tensorrt, calibration_batches
from qswin.trt.graphs.files import parse_metadata, properties, read_onnx
from qswin.trt.graphs.half_precision import is_quantized


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
