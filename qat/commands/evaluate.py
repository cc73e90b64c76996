"""`qswin evaluate`."""

import argparse
from pathlib import Path

from qswin.calib.files import write_result
from qswin.qat.backends.registry import OpenOptions, open_predictor
from qswin.qat.commands.arguments import add_model_arguments, add_plugin_argument, count, positive, workers
from qswin.trt.engines.plugin import load_plugin
from qswin.trt.evaluation.evaluate import EvaluationOptions, evaluate_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Acc@1 and Acc@5 over a folder of images, one folder a class; of a segmentation model Dice and HD95 over"
        " images/ and masks/."
    )
    parser.epilog = (
        "example:\n  qswin evaluate --model runs/x/int8.onnx --data DIR/val --json runs/x/int8-accuracy.json"
    )
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint, an ONNX file, an engine or a package")
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/val")
    parser.add_argument("--json", type=Path, help="write the result here too; - is standard output")
    parser.add_argument("--images", type=count, default=0, help="evaluate this many, evenly spread; 0: all")
    parser.add_argument("--batch-size", type=positive, default=32, help="of models that take any")
    parser.add_argument("--workers", type=workers, help="decoding processes; default: one a core, 16 at most")
    parser.add_argument("--skip-unreadable", action="store_true", help="count and skip files that cannot be read")
    parser.add_argument(
        "--pictures", type=Path, help="folder for pictures of the worst images; of segmentation, with masks"
    )
    parser.add_argument("--worst", type=count, default=8, help="how many pictures")
    add_model_arguments(parser)
    add_plugin_argument(parser)


def main(args: argparse.Namespace) -> None:
    if args.plugin:
        load_plugin(args.plugin)
    predictor = open_predictor(
        args.model, OpenOptions(args.threads, args.device, args.config, tuple(args.overrides), args.timeout)
    )
    options = EvaluationOptions(
        args.images, args.batch_size, args.workers, args.skip_unreadable, args.pictures, args.worst
    )
    report, worst = evaluate_folder(args.model, predictor, args.data, options)
    if args.json:
        write_result(args.json, "evaluation", report)
    if worst is not None:
        worst.draw()  # last, so that a full disk costs the pictures only
