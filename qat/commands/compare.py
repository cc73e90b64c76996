"""`qswin compare`."""

import argparse
from pathlib import Path
from typing import Any

from qswin.calib.files import write_result
from qswin.calib.messages import printable
from qswin.qat.backends.registry import OpenOptions, backend_of, open_predictor
from qswin.qat.commands.arguments import (
    above_zero,
    add_device_argument,
    add_plugin_argument,
    add_timeout_argument,
    count,
)
from qswin.trt.engines.plugin import load_plugin
from qswin.trt.evaluation.compare import (
    first_parting,
    layer_errors,
    model_errors,
    read_images,
    sentence,
    shared_batch_size,
    worst_layers,
)
from qswin.trt.graphs.runtime import OnnxRuntimePredictor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Errors of a model against an ONNX file in ONNX Runtime, on the same images."
    parser.epilog = (
        "example:\n  qswin compare --model runs/x/fp16.engine --reference runs/x/fp32.onnx --data DIR/val --layers"
    )
    parser.add_argument(
        "--model", required=True, type=Path, help="an engine, an ONNX file, a package, a bundle or a checkpoint"
    )
    parser.add_argument("--reference", required=True, type=Path, help="an ONNX file")
    parser.add_argument("--data", type=Path, help="folder of images; without it, random ones")
    parser.add_argument("--images", type=count, default=16, help="how many, evenly spread over the folder; 0: all")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip files that cannot be read")
    parser.add_argument("--layers", action="store_true", help="every activation too, and where they part first")
    parser.add_argument(
        "--tolerance", type=above_zero, default=0.1, help="relative error of a tensor that counts as parting"
    )
    add_timeout_argument(parser)
    add_device_argument(parser)
    add_plugin_argument(parser)
    parser.add_argument("--json", type=Path, help="write the errors here too; - is standard output")


def main(args: argparse.Namespace) -> None:
    if args.plugin:
        load_plugin(args.plugin)
    opening = OpenOptions(device=args.device, timeout=args.timeout)
    ours, theirs = open_predictor(args.model, opening), OnnxRuntimePredictor(args.reference, timeout=args.timeout)
    images = read_images(args.data, args.images, theirs.task, theirs.preprocessing, args.skip_unreadable)
    errors = model_errors(ours, theirs, images)
    report: dict[str, Any] = {"model": str(args.model), "reference": str(args.reference), **errors}
    print(f"{args.model} against {args.reference}: {sentence(errors, len(images))}")
    if args.layers:
        size = shared_batch_size(ours, theirs)
        values = backend_of(args.model).activations(args.model, args.reference, images[:size], opening)
        layers = layer_errors(values, args.reference, images[:size], args.timeout)
        report |= {"layers": dict(layers), "parting": first_parting(layers, args.tolerance)}
        print(f"{worst_layers(layers)}\n{printable(report['parting'])}")
    if args.json:
        write_result(args.json, "comparison", report)
