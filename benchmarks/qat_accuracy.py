"""Acc@1 after QAT from reconstructed checkpoints, three seeds, Swin-T on Tiny-ImageNet: rows beside those of PTQ.

    python -m benchmarks.qat_accuracy --data DIR --checkpoint FILE --work runs/qat --out docs/results/qat-accuracy.json

Each bit width is calibrated and reconstructed once (the best settings of benchmarks.accuracy), then trained with the
seeds side by side on the device, by the commands that users run; what is finished is kept.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.accuracy import our_recipe
from benchmarks.results import commit, device_name, write_rows

CONFIG = "configs/swin_tiny_tinyimagenet.yaml"
RECIPE = "full, searched probs, mse weights"
LEARNED = ("train.learn_ranges=true", "train.freeze_ranges_at=0.9")
W4A4 = ("train.lr=5e-5", *LEARNED)
VARIANTS = {  # name: (bits, settings of training)
    "W8A8": ("W8A8", ()),
    "W4A4, oscillations counted": ("W4A4", (*W4A4, "train.freeze_oscillating=1")),
    "W4A4, oscillating weights frozen": ("W4A4", (*W4A4, "train.freeze_oscillating=0.02")),
}


def calibrate(bits: str, args: argparse.Namespace) -> Path:
    """The reconstructed checkpoint of a bit width."""
    folder, recipe = args.work / bits, args.work / f"{bits}.yaml"
    args.work.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(dataclasses.replace(our_recipe("full", bits), weight_calibrator="mse").to_dict()))
    if not (folder / "ptq.safetensors").is_file():
        settings = [f"recipe={recipe}", f"calibration.reconstruct_steps={args.reconstruct_steps}", f"run={folder}"]
        subprocess.run([sys.executable, "-m", "qswin", "calibrate", *common(args), *settings], check=True)
    return folder / "ptq.safetensors"


def common(args: argparse.Namespace) -> list[str]:
    data = [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}", f"data.workers={args.workers}"]
    return ["--config", CONFIG, *data]


def train(name: str, seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a seed, all trained at once."""
    bits, settings = VARIANTS[name]
    init = calibrate(bits, args)
    start, jobs = time.perf_counter(), []
    for seed in seeds:
        folder = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        more = [
            f"recipe={args.work / bits}.yaml",
            f"init={init}",
            f"seed={seed}",
            f"run={folder}",
            *settings,
            *args.settings,
        ]
        jobs.append((folder, subprocess.Popen([sys.executable, "qat/train.py", *common(args), *more])))
    failed = [folder for folder, job in jobs if job.wait()]
    if failed:
        raise SystemExit(f"{failed[0]}: training failed; its error is above")
    seconds = round(time.perf_counter() - start, 1)
    return [row(name, bits, seed, folder, seconds, args) for seed, (folder, _) in zip(seeds, jobs, strict=True)]


def row(name: str, bits: str, seed: int, folder: Path, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """What the last line of the log that has an accuracy says."""
    last = [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "acc1" in line][-1]
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    what = {"toolkit": "qswin", "recipe": f"{RECIPE}, reconstructed", "variant": name, "bits": bits, "stage": "qat"}
    return {**what, "seed": seed, **last, "seconds": seconds, "device": device, "commit": args.commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--reconstruct_steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of training")
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    rows = [train(name, args.seeds, args) for name in args.variants]
    write_rows(args.out, list(itertools.chain.from_iterable(rows)))


if __name__ == "__main__":
    main()
