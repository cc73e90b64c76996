"""`qswin calib-cache`."""

import argparse
from pathlib import Path

from qswin.calib.files import write_result
from qswin.calib.trt_cache.cache_file import ALGORITHMS
from qswin.qat.commands.arguments import add_sample_arguments, add_timeout_argument
from qswin.trt.engines.calibrate import CacheOptions, make_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a calibration cache for implicit INT8 (TensorRT before 11) of an FP32 ONNX file."
    parser.epilog = (
        "example:\n  qswin calib-cache --onnx runs/x/fp32.onnx --data DIR/train --cache runs/x/entropy2.cache"
        " --algorithm entropy2 --offline"
    )
    parser.add_argument("--onnx", required=True, type=Path, help="the FP32 file that an engine is to be built from")
    parser.add_argument(
        "--cache", required=True, type=Path, help="the .cache file to write; its sidecar goes beside it"
    )
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="entropy2", help="how ranges are found")
    add_sample_arguments(parser, images=512, batch_size=16)
    parser.add_argument("--offline", action="store_true", help="from ONNX Runtime's activations; needs no GPU")
    parser.add_argument("--tensorrt-version", default="8.6.0", help="that an offline cache is for")
    add_timeout_argument(parser)
    parser.add_argument("--json", type=Path, help="write what the cache was made of here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    options = CacheOptions(
        args.algorithm,
        args.images,
        args.batch_size,
        args.seed,
        args.workers,
        args.skip_unreadable,
        args.tensorrt_version if args.offline else None,
        args.timeout,
    )
    made = make_cache(args.onnx, args.data, args.cache, options)
    if args.json:
        write_result(args.json, "calibration cache report", {"cache": str(args.cache), **made})
