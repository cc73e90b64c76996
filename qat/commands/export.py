"""`qswin export`."""

import argparse
from pathlib import Path

PRECISIONS = ("int8", "fp8", "fp32", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a checkpoint as ONNX."
    parser.epilog = "example:\n  qswin export --checkpoint runs/x/qat.safetensors --onnx runs/x/int8.onnx"
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, or bare weights with --config")
    parser.add_argument("--onnx", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="int8 and fp8, of which the checkpoint's is the default, have Q/DQ nodes; the others have none",
    )
    parser.add_argument("--opset", type=int, default=20, help="17 for TensorRT 8.x, else 18 or newer")
    parser.add_argument("--batch-size", default="dynamic", help="a number, or dynamic")
    parser.add_argument(
        "--sizes",
        metavar="HxW,...",
        help="of images, for a backbone: a graph for each, as 800x1344,1344x800; or dynamic, one graph for any",
    )
    parser.add_argument("--config", help="for bare weights, which lack a sidecar: the YAML file that describes them")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="over --config's"
    )
    parser.add_argument("--strict", action="store_true", help="refuse a model whose verdict is bad")
    parser.add_argument("--json", type=Path, help="write what was exported: its size, nodes and metadata")


def main(args: argparse.Namespace) -> None:
    from absl import logging

    from qswin.calib.files import write_result
    from qswin.qat.export.job import ExportOptions, export_checkpoint, parse_batch_size, parse_sizes

    batch_size, sizes = parse_batch_size(args.batch_size), parse_sizes(args.sizes)
    options = ExportOptions(args.precision, args.opset, batch_size, sizes, args.strict)
    exported = export_checkpoint(args.checkpoint, args.onnx, options, args.config, args.overrides)
    for each in exported:
        logging.info("%s", each)
    if args.json:
        first, *others = (each.to_dict() for each in exported)
        write_result(args.json, "export", {**first, "others": others} if others else first)
