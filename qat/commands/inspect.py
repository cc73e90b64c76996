"""`qswin inspect`."""

import argparse
from pathlib import Path

from qswin.calib.files import write_result
from qswin.qat.backends.registry import backend_of
from qswin.qat.commands.arguments import add_plugin_argument
from qswin.trt.engines.plugin import load_plugin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Lists what a model consists of: quantizers of a checkpoint, layers of an engine or ONNX file."
    parser.epilog = (
        "example:\n  qswin inspect --model runs/x/ptq.safetensors\n  qswin inspect --model runs/x/int8.engine --time"
    )
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, an ONNX file or an engine")
    parser.add_argument("--time", action="store_true", help="measure each of an engine's layers")
    add_plugin_argument(parser)
    parser.add_argument("--json", type=Path, help="write the list here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    if args.plugin:
        load_plugin(args.plugin)
    listing = backend_of(args.model).listing(args.model, args.time)
    print(listing.table)
    if args.json:
        write_result(args.json, listing.kind, {"model": str(args.model), listing.kind: listing.rows})
