"""Swin-Unet on ACDC: float, PTQ and QAT in torch and ONNX Runtime, each step a qswin command; finished ones are kept.

python -m benchmarks.acdc --npz FILE --out DIR
python -m benchmarks.swin_unet --data DIR --checkpoint FILE --work runs/unet --out docs/results/family.json
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.results import commit, device_name, write_rows

CONFIG = "configs/swin_unet_acdc.yaml"
KEPT = ("dice", "dice_per_class", "volume_dice", "volume_hd95", "images")


class Job:
    """Runs commands whose product is missing, and collects a row for each evaluation."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        self.settings = [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}"]

    def run(self, product: Path, *command: str | Path) -> Path:
        if not product.is_file():
            subprocess.run([sys.executable, "-m", "qswin", *map(str, command)], check=True)
        return product

    def evaluate(self, model: Path, row: dict, config: bool = False) -> None:
        """Torch for a checkpoint; the exported graph in ONNX Runtime."""
        bare = ["--config", CONFIG] if config else []
        report = self.args.work / f"{model.parent.name}-{model.name}.json"
        self.run(report, "evaluate", "--model", model, *bare, "--data", self.args.data / "val", "--json", report)
        result = json.loads(report.read_text())
        measured = {key: round(result[key], 4) if isinstance(result[key], float) else result[key] for key in KEPT}
        backend = {"backend": result["backend"], **measured, "device": device_name("cpu"), "commit": commit()}
        self.rows.append({"model": "swin_unet_tiny_patch4_window7_224", **row, **backend})
        print(f"{row['recipe']:<6} {row['stage']:<6} {result['backend']:<22} {result['dice']:.4f}", flush=True)
        write_rows(self.args.out, self.rows)

    def both(self, checkpoint: Path, row: dict, precision: str) -> None:
        """A checkpoint in torch and, exported, in ONNX Runtime."""
        bare = precision == "fp32"
        self.evaluate(checkpoint, row, config=bare)
        onnx = self.args.work / row["recipe"] / f"{row['stage']}.onnx"
        source = ["--checkpoint", checkpoint, *(["--config", CONFIG] if bare else [])]
        self.run(onnx, "export", *source, "--onnx", onnx, "--precision", precision)
        self.evaluate(onnx, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints, graphs and reports")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    job = Job(args)
    job.both(args.checkpoint, {"recipe": "none", "stage": "float"}, "fp32")
    for recipe in ("gemm", "full"):
        run = args.work / recipe
        settings = [*job.settings, f"recipe={recipe}", f"run={run}"]
        ptq = job.run(run / "ptq.safetensors", "calibrate", "--config", CONFIG, *settings)
        job.both(ptq, {"recipe": recipe, "stage": "ptq"}, "int8")
    settings = [*job.settings, f"init={args.work / 'full' / 'ptq.safetensors'}", f"run={args.work / 'full'}"]
    qat = job.run(args.work / "full" / "qat.safetensors", "train", "--config", CONFIG, *settings)
    job.both(qat, {"recipe": "full", "stage": "qat"}, "int8")


if __name__ == "__main__":
    main()
