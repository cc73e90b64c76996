"""Accuracy of Swin-T on Tiny-ImageNet in torch and ONNX Runtime: float, PTQ per calibrator and recipe, or checkpoints.

python -m benchmarks.swin_tiny --data DIR --checkpoint FILE --out docs/results/swin_tiny.json [--trained CHECKPOINT ...]
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.calibrators import CALIBRATORS
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Description, load_checkpoint
from qswin.qat.config import load_config
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.float_model import build_float_model
from qswin.qat.ptq.ranges import find_ranges, set_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.trt.evaluation.evaluate import Accuracy, evaluate
from qswin.trt.graphs.runtime import OnnxRuntimePredictor

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "swin_tiny_tinyimagenet.yaml"


class Table:
    """Evaluates models over the same decoded images and collects rows."""

    def __init__(self, args: argparse.Namespace, description: Description) -> None:
        folder = scan_folder("classification", args.data / "val")
        samples = folder.samples[:: args.every]
        self.batches = list(image_batches(samples, description.preprocessing, 64, workers=args.workers))
        self.args, self.rows = args, []

    def add(self, model: torch.nn.Module, description: Description, calibrator: str | None) -> None:
        """One row from torch and one from the exported ONNX."""
        row = {
            "model": "swin_tiny_patch4_window7_224",
            "recipe": description.recipe.name if description.recipe else "none",
            "calibrator": calibrator,
            "bits": 8 if description.recipe else 32,
            "stage": description.stage,
        }
        if "torch" in self.args.backends:
            result = evaluate(TorchPredictor(model, description, self.args.device), self.batches, [Accuracy()])
            self._append(row, "torch", result, device_name(self.args.device))
        if "onnxruntime" in self.args.backends:
            self._append(row, "onnxruntime", self._onnxruntime(model, description), device_name("cpu"))
            model.to(self.args.device)

    def _onnxruntime(self, model: torch.nn.Module, description: Description) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            precision = "int8" if description.recipe else "fp32"
            save_onnx(onnx, export_onnx(model, description, precision), description.to_dict())
            return evaluate(OnnxRuntimePredictor(onnx), self.batches, [Accuracy()])

    def _append(self, row: dict, backend: str, result: dict, device: str) -> None:
        measured = {"acc1": round(result["acc1"], 2), "acc5": round(result["acc5"], 2), "images": result["images"]}
        self.rows.append({**row, "backend": backend, **measured, "device": device, "commit": self.args.commit})
        print(" ".join(f"{value!s:<12}" for value in list(self.rows[-1].values())[1:9]), flush=True)
        write_rows(self.args.out, self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--trained", nargs="*", type=Path, default=[], help="checkpoints to add; PTQ is left out then")
    parser.add_argument("--backends", nargs="*", default=["torch", "onnxruntime"])
    parser.add_argument("--no_float", action="store_true", help="leave out the float model")
    parser.add_argument("--recipes", nargs="*", default=["gemm", "full"])
    parser.add_argument("--calibrators", nargs="*", default=list(CALIBRATORS))
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    config = load_config(CONFIG, [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}", "run=unused"])
    built = build_float_model(config.model, config.data.preprocessing)
    model, preprocessing = built.model, built.preprocessing
    floating = Description(built.arguments, "float", preprocessing)
    table = Table(args, floating)
    for path in args.trained:
        table.add(*load_checkpoint(path), calibrator=None)
    if args.trained:
        return
    if not args.no_float:
        table.add(model, floating, None)
    samples = draw_samples(scan_folder("classification", args.data / "train"), args.images, seed=0)
    for name in args.recipes:
        recipe = named_recipe(name)
        twin = quantize(model, recipe).to(args.device)
        images = image_batches(samples, preprocessing, 64, workers=args.workers)
        start = time.perf_counter()
        find_ranges(twin, (torch.from_numpy(batch.images).to(args.device) for batch in images))
        print(f"{name}: {args.images} images calibrated in {time.perf_counter() - start:.1f} s")
        for calibrator in args.calibrators:
            set_ranges(twin, calibrator)
            table.add(twin, Description(built.arguments, "ptq", preprocessing, recipe=recipe), calibrator)


if __name__ == "__main__":
    main()
