"""`qswin compare`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qswin.calib.files import write_json
from qswin.qat.backends.inductor import SUFFIX, Package
from qswin.trt.evaluation.compare import first_parting, layer_errors, output_errors, read_images
from qswin.trt.evaluation.evaluate import open_predictor
from qswin.trt.graphs.runtime import OnnxRuntimePredictor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Errors of an engine or ONNX file against an ONNX file in ONNX Runtime, on the same images."
    parser.epilog = (
        "example:\n  qswin compare --model runs/x/fp16.engine --reference runs/x/fp32.onnx --data DIR/val --layers"
    )
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--reference", required=True, type=Path, help="an .onnx file")
    parser.add_argument("--data", type=Path, help="folder of images; without it, random ones")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--layers", action="store_true", help="every activation too, and where they part first")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative error of a tensor that counts as parting")
    parser.add_argument("--json", type=Path)


def main(args: argparse.Namespace) -> None:
    ours = Package(args.model) if args.model.suffix == SUFFIX else open_predictor(args.model)
    theirs = OnnxRuntimePredictor(args.reference)
    images = read_images(args, theirs.task, theirs.preprocessing)
    size = min(ours.batch_size or 16, theirs.batch_size or 16)
    logits = [np.concatenate([p(images[i : i + size]) for i in range(0, len(images), size)]) for p in (ours, theirs)]
    report: dict[str, Any] = {"model": str(args.model), "reference": str(args.reference), **output_errors(*logits)}
    print(json.dumps(report, indent=1))
    if args.layers:
        errors = layer_errors(args.model, args.reference, images[:size])
        report["layers"] = dict(errors)
        report["parting"] = first_parting(errors, args.tolerance)
        worst = sorted(errors, key=lambda item: -item[1])[:10]
        print("\n".join(f"{error:10.5f}  {name}" for name, error in worst))
        print(report["parting"])
    if args.json:
        write_json(args.json, {**report, "command": sys.argv})
