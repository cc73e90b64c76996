"""The families on TensorRT: errors of their engines against ONNX Runtime, and latencies, with random weights.

    python -m benchmarks.family export --out DIR                                    (torch)
    python -m benchmarks.family measure --models DIR --out docs/results/family-tensorrt.json   (a GPU; no torch)

Random weights cost what trained ones do; their errors are those of the arithmetic, not of a task.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from calib.files import write_json

MODELS = {
    "swinv2": "swinv2_tiny_window8_256",
    "cvt": "cvt-13",
    "unet": "swin_unet_tiny_patch4_window7_224",
    "deit": "deit_small_patch16_224",
}
ENGINES = {"fp32": ("fp32", "fp32"), "fp16": ("fp32", "fp16"), "int8": ("int8", "int8")}  # name: ONNX file, precision


def export(args: argparse.Namespace) -> None:
    """fp32.onnx and int8.onnx (`full`) of each model at opset 17, calibrated on noise."""
    import torch

    from calib.images import Preprocessing
    from models.registry import build_model, family_of
    from qat.checkpoint import Description
    from qat.export import export_onnx, save_onnx
    from qat.ptq import calibrate
    from qat.recipe import named_recipe
    from qat.rewrite import quantize

    for short in args.only:
        torch.manual_seed(0)
        model = build_model(MODELS[short])
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # V2's are 0 before training, and its blocks then do nothing
                torch.nn.init.normal_(module.weight, 1.0, 0.1)
        preprocessing = Preprocessing(**family_of(MODELS[short]).preprocessing(model))
        recipe = named_recipe("full")
        twin = quantize(model, recipe)
        calibrate(twin, torch.randn(args.images, 3, *preprocessing.size).split(4))
        description = Description({"name": MODELS[short]}, "ptq", preprocessing, recipe=recipe)
        for precision in ("fp32", "int8"):
            path = args.out / f"{short}-{precision}.onnx"
            save_onnx(path, export_onnx(twin, description, precision, opset=17), description.to_dict())
            print(path, flush=True)


def run(name: str, *command: str | Path) -> bool:
    """One qswin command in a process of its own; prints its error."""
    done = subprocess.run([sys.executable, "-m", *map(str, command)], text=True, capture_output=True)
    print(f"{name}: {'done' if done.returncode == 0 else done.stderr[-800:]}", flush=True)
    return done.returncode == 0


def measure(args: argparse.Namespace) -> None:
    """Builds, compares and times the engines of every model in the folder."""
    report: dict[str, Any] = {"errors": {}, "builds": {}, "rows": [], "commit": args.commit}
    for short in args.only:
        engines = []
        for name, (onnx, precision) in ENGINES.items():
            graph, engine = args.models / f"{short}-{onnx}.onnx", args.models / f"{short}-{name}.engine"
            options = ["--precision", precision, "--shapes", args.shapes, "--level", args.level]
            if not run(f"build {engine.name}", "trt.build", "--onnx", graph, "--engine", engine, *options):
                continue
            engines.append(engine)
            report["builds"][engine.stem] = json.loads(engine.with_suffix(".json").read_text())["seconds"]
            result = args.models / f"{engine.stem}-errors.json"
            against = ["--reference", graph, "--images", "8", "--json", result]
            if run(f"compare {engine.name}", "trt.compare", "--model", engine, *against):
                values = json.loads(result.read_text())
                report["errors"][engine.stem] = {k: v for k, v in values.items() if isinstance(v, int | float)}
            write_json(args.out, report)
        timed = args.models / f"{short}-bench.json"
        models = [*engines, *([args.models / f"{short}-fp32.onnx"] if args.onnxruntime else [])]
        if engines and run(f"bench {short}", "trt.bench", "--model", *models, "--batch", args.batch, "--json", timed):
            report["rows"] += [{"family": short, **row} for row in json.loads(timed.read_text())["rows"]]
        write_json(args.out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    exporting = steps.add_parser("export")
    exporting.add_argument("--out", required=True, type=Path)
    exporting.add_argument("--images", type=int, default=8)
    exporting.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    exporting.set_defaults(step=export)
    measuring = steps.add_parser("measure")
    measuring.add_argument("--models", required=True, type=Path)
    measuring.add_argument("--out", required=True, type=Path)
    measuring.add_argument("--shapes", default="1,8,32")
    measuring.add_argument("--batch", default="1,4,8,16,32")
    measuring.add_argument("--level", default="2")
    measuring.add_argument("--onnxruntime", action="store_true", help="time ONNX Runtime on the CPU too")
    measuring.add_argument("--commit", default="unknown")
    measuring.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    measuring.set_defaults(step=measure)
    args = parser.parse_args()
    args.step(args)


if __name__ == "__main__":
    main()
