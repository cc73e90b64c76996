"""`qswin build`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from qswin.calib.files import write_result
from qswin.qat.backends.bundle import parse_architectures
from qswin.qat.backends.registry import build, build_targets, builder
from qswin.trt.engines.options import PRECISIONS, parse_bytes
from qswin.trt.engines.precision import PRESETS

COMMON = ("target", "engine", "json")  # the flags of every target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds a TensorRT engine from an exported ONNX file, without a GPU a TensorRT-RTX one, or, from a calibrated"
        " checkpoint, a package of the project's own kernels, in INT8 or FP8 (inductor), or, without a GPU, a bundle of"
        " them, which runs without torch (bundle). A plugin makes a bundle the one layer of a TensorRT engine"
        " (--bundle, --plugin)."
    )
    parser.epilog = (
        "example:\n"
        "  qswin build --onnx runs/x/int8.onnx --engine runs/x/int8.engine --precision int8 --batch-sizes 64\n"
        "  qswin build --onnx runs/x/int8.onnx --engine runs/x/int8.engine --target tensorrt-rtx --capability 8.9\n"
        "  qswin build --checkpoint runs/x/ptq.safetensors --engine runs/x/int8.pt2 --target inductor --batch-sizes 64"
        "\n"
        "  qswin build --checkpoint runs/x/ptq.safetensors --engine runs/x/int8.qsb --target bundle --batch-sizes 1,64"
        "\n"
        "  qswin build --bundle runs/x/int8.qsb --plugin cpp/build/libqswin_trt.so --engine runs/x/kernels.engine"
    )
    parser.add_argument(
        "--target", choices=build_targets(), default="tensorrt", help="what is built, and for which runtime"
    )
    parser.add_argument("--onnx", type=Path, help="the exported file to build from")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="to build from, of --target inductor and bundle: calibrated with recipe=attention or attention-fp8",
    )
    parser.add_argument("--bundle", type=Path, help="to build from, of --target tensorrt, with --plugin")
    parser.add_argument("--plugin", type=Path, help="of --bundle: libqswin_trt.so, which running the engine takes too")
    parser.add_argument("--engine", required=True, type=Path, help="the file to write; its sidecar goes beside it")
    parser.add_argument("--precision", help=f"{', '.join(PRECISIONS)}; default: best")
    parser.add_argument(
        "--batch-sizes",
        help="smallest, usual and largest batch, or one number; default: 1,8,64."
        " Of --target bundle, every batch that it is for; default: 1,64. Of --bundle, batches that it holds",
    )
    parser.add_argument("--arch", help="architectures that a bundle is for; default: 80,86,89,90; of FP8 89,90")
    parser.add_argument("--capability", help="compute capability that TensorRT-RTX builds for; default: 8.9")
    parser.add_argument("--calib-cache", type=Path, help="implicit INT8 from this cache (qswin calib-cache)")
    parser.add_argument(
        "--override",
        action="append",
        metavar="PATTERN=PRECISION",
        help=f"operator type or regular expression on node names, fp32|fp16|int8; or a preset: {', '.join(PRESETS)}",
    )
    parser.add_argument("--timing-cache", type=Path, help="default, of TensorRT: timing.cache beside the engine")
    parser.add_argument("--workspace", help="GPU memory for tactics, e.g. 4GiB; default: all of it")
    parser.add_argument("--level", type=int, choices=range(6), help="builder optimization level")
    parser.add_argument("--fold", action="store_const", const=True, help="fold constants first")
    parser.add_argument("--json", type=Path, help="write the sidecar here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(args).items() if name not in COMMON and value is not None}
    parsers: dict[str, Callable[[Any], Any]] = {
        "batch_sizes": builder(args.target).parse_batch_sizes,
        "workspace": parse_bytes,
        "override": tuple,
        "arch": parse_architectures,
    }
    for name, parse in parsers.items():
        if name in given:
            given[name] = parse(given[name])
    built = build(args.target, args.engine, given)
    if args.json:
        write_result(args.json, "build", {"engine": str(args.engine), **built})
    warm = ", timing cache warm" if built.get("warm_timing_cache") else ""
    logging.info("%s: %.1f MB in %.1f s%s", args.engine, built["bytes"] / 1e6, built["seconds"], warm)
