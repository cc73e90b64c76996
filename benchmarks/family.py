"""The families on TensorRT: errors of their engines against ONNX Runtime, and latencies, with random weights.

    python -m benchmarks.family export --out DIR                                    (torch)
    qswin bench --model DIR/swinv2.safetensors --batch-sizes 1,4,8,16,32 --json DIR/swinv2-torch.json (torch, others)
    python -m benchmarks.family measure --models DIR --out docs/results/family-tensorrt.json   (a GPU; no torch)

Random weights cost what trained ones do; their errors are those of the arithmetic, not of a task.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.steps import Steps
from qswin.calib.files import sidecar_path, write_json
from qswin.calib.reading import read_json

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

    from qswin.calib.data.images import Preprocessing
    from qswin.models.registry import build_model, family_of
    from qswin.qat.checkpoint import Description, save_checkpoint
    from qswin.qat.export.onnx_export import export_onnx, save_onnx
    from qswin.qat.ptq.ranges import find_ranges
    from qswin.qat.quant.recipe import named_recipe
    from qswin.qat.quant.rewrite import quantize

    for short in args.only:
        torch.manual_seed(0)
        model = build_model(MODELS[short])
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # V2's are 0 before training, and its blocks then do nothing
                torch.nn.init.normal_(module.weight, 1.0, 0.1)
        preprocessing = Preprocessing(**family_of(MODELS[short]).preprocessing(model))
        save_checkpoint(
            args.out / f"{short}.safetensors", model, Description({"name": MODELS[short]}, "float", preprocessing)
        )
        recipe = named_recipe("full")
        twin = quantize(model, recipe)
        find_ranges(twin, torch.randn(args.images, 3, *preprocessing.size).split(4))
        description = Description({"name": MODELS[short]}, "ptq", preprocessing, recipe=recipe)
        for precision in ("fp32", "int8"):
            path = args.out / f"{short}-{precision}.onnx"
            save_onnx(path, export_onnx(twin, description, precision, opset=17), description.to_dict())
            print(path, flush=True)


class Measurement:
    """Builds, compares and times the engines of the models in a folder; results gather in `report`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.steps = args, Steps(args.gpus.split(","))
        self.report: dict[str, Any] = {"errors": {}, "builds": {}, "rows": [], "commit": args.commit}

    def write(self) -> None:
        write_json(self.args.out, {**self.report, "failed": self.steps.failed})

    def build(self, job: tuple[str, str]) -> None:
        """One engine, and its errors against its ONNX file in ONNX Runtime."""
        short, name = job
        onnx, precision = ENGINES[name]
        graph, engine = (self.args.models / f"{short}-{stem}" for stem in (f"{onnx}.onnx", f"{name}.engine"))
        options = ["--precision", precision, "--batch-sizes", self.args.shapes, "--level", self.args.level]
        files = ["--onnx", graph, "--engine", engine, "--timing-cache", engine.with_suffix(".timing")]
        if not self.steps.run(f"build {engine.name}", "qswin", "build", *files, *options):
            return
        self.report["builds"][engine.stem] = read_json(sidecar_path(engine))["seconds"]
        result = self.args.models / f"{engine.stem}-errors.json"
        against = ["--reference", graph, "--images", "8", "--json", result]
        if self.steps.run(f"compare {engine.name}", "qswin", "compare", "--model", engine, *against):
            values = json.loads(result.read_text())
            self.report["errors"][engine.stem] = {k: v for k, v in values.items() if isinstance(v, int | float)}
        self.write()

    def bench(self, short: str) -> None:
        timed = self.args.models / f"{short}-bench.json"
        models = [path for name in ENGINES if (path := self.args.models / f"{short}-{name}.engine").is_file()]
        models += [self.args.models / f"{short}-fp32.onnx"] if self.args.onnxruntime else []
        options = ["--batch-sizes", self.args.batch, "--threads", "16", "--json", timed]
        if models:
            self.steps.run(f"bench {short}", "qswin", "bench", "--model", *models, *options)
        for rows in (timed, self.args.models / f"{short}-torch.json"):
            if rows.is_file():
                self.report["rows"] += [{"family": short, **row} for row in json.loads(rows.read_text())["rows"]]
        self.write()


def measure(args: argparse.Namespace) -> None:
    measurement = Measurement(args)
    measurement.steps.each(measurement.build, [(short, name) for short in args.only for name in ENGINES])
    measurement.steps.each(measurement.bench, args.only)


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
    measuring.add_argument("--gpus", default="0", help="to work on, one step each at a time, e.g. 0,1")
    measuring.add_argument("--commit", default="unknown")
    measuring.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    measuring.set_defaults(step=measure)
    args = parser.parse_args()
    args.step(args)


if __name__ == "__main__":
    main()
