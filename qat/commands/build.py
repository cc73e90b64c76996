"""`qswin build`."""

import argparse
from pathlib import Path

from absl import logging

from qswin.calib.files import write_json
from qswin.qat.backends.inductor import NOT_HERE, SUFFIX, TARGET, build
from qswin.trt.engines.build import PRECISIONS, BuildOptions, build_engine, parse_bytes, parse_profile, save_engine
from qswin.trt.engines.engine import SUFFIXES
from qswin.trt.engines.precision import PRESETS
from qswin.trt.engines.version import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds a TensorRT engine from an exported ONNX file, without a GPU a TensorRT-RTX one, or, from a calibrated"
        " checkpoint, a package of the project's own INT8 kernels (inductor)."
    )
    parser.epilog = (
        "example:\n  qswin build --onnx runs/x/int8.onnx --engine runs/x/int8.engine --precision int8 --shapes 1,16,64\n"
        "  qswin build --onnx runs/x/int8.onnx --engine runs/x/int8.engine --target tensorrt-rtx --capability 8.9\n"
        "  qswin build --checkpoint runs/x/ptq.safetensors --engine runs/x/int8.pt2 --target inductor --shapes 64"
    )
    parser.add_argument("--onnx", type=Path, help="the exported file to build from")
    parser.add_argument("--engine", required=True, type=Path, help="the file to write; its sidecar goes beside it")
    parser.add_argument("--precision", default="best", help=", ".join(PRECISIONS))
    parser.add_argument("--target", choices=(*TARGETS, TARGET), default="tensorrt")
    parser.add_argument("--capability", default="8.9", help="compute capability that TensorRT-RTX builds for")
    parser.add_argument("--calib-cache", type=Path, help="implicit INT8 from this cache (qswin calib-cache)")
    parser.add_argument("--shapes", default="1,8,64", help="smallest, usual and largest batch, or one number")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help=f"operator type or regular expression on node names, fp32|fp16|int8; or a preset: {', '.join(PRESETS)}",
    )
    parser.add_argument("--timing-cache", type=Path, help="default: timing.cache beside the engine")
    parser.add_argument("--workspace", help="GPU memory for tactics, e.g. 4GiB; default: all of it")
    parser.add_argument("--level", type=int, choices=range(6), help="builder optimization level")
    parser.add_argument("--fold", action="store_true", help="fold constants first")
    parser.add_argument("--json", type=Path, help="write the sidecar here too")
    parser.add_argument("--checkpoint", type=Path, help="to build from, of target inductor: calibrated, recipe attention")


def main(args: argparse.Namespace) -> None:
    if args.target != TARGET:
        if args.checkpoint is not None:
            raise ValueError(f"--checkpoint is for --target {TARGET}; export it and give --onnx")
        build_from_onnx(args)
        return
    foreign = [name for name in NOT_HERE if getattr(args, name)]
    if foreign or args.precision not in ("int8", "best"):
        what = f"--{foreign[0].replace('_', '-')}" if foreign else f"--precision {args.precision}"
        raise ValueError(f"{what} is not for --target {TARGET}, which builds INT8 from a --checkpoint")
    if args.checkpoint is None or args.engine.suffix != SUFFIX:
        raise ValueError(f"--target {TARGET} builds from a --checkpoint, and its --engine ends in {SUFFIX}")
    package, sidecar = build(args.checkpoint, parse_profile(args.shapes))
    args.engine.parent.mkdir(parents=True, exist_ok=True)
    save_engine(args.engine, package, sidecar)
    if args.json:
        write_json(args.json, sidecar)
    logging.info("%s: %.1f MB in %.1f s", args.engine, len(package) / 1e6, sidecar["seconds"])


def build_from_onnx(args: argparse.Namespace) -> None:
    if args.onnx is None:
        raise ValueError("give --onnx FILE: an exported file to build from (qswin export writes one)")
    if args.engine.suffix not in SUFFIXES:
        raise ValueError(f"--engine {args.engine}: end it in {' or '.join(SUFFIXES)}, by which qswin knows an engine")
    rtx = args.target == "tensorrt-rtx"
    args.engine.parent.mkdir(parents=True, exist_ok=True)
    options = BuildOptions(
        precision=args.precision,
        target=args.target,
        profile=parse_profile(args.shapes),
        overrides=tuple(args.override),
        calib_cache=args.calib_cache,
        capability=args.capability,
        timing_cache=args.timing_cache or (None if rtx else args.engine.with_name("timing.cache")),
        workspace=None if args.workspace is None else parse_bytes(args.workspace),
        level=args.level,
        fold=args.fold,
    )
    engine, sidecar = build_engine(args.onnx, options)
    save_engine(args.engine, engine, sidecar)
    if args.json:
        write_json(args.json, sidecar)
    for node, instead in sidecar["not_honoured"].items():
        logging.warning("override not honoured: %s is %s", node, instead)
    warm = ", timing cache warm" if sidecar["warm_timing_cache"] else ""
    logging.info("%s: %.1f MB in %.1f s%s", args.engine, len(engine) / 1e6, sidecar["seconds"], warm)
