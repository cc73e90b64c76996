"""How much each site costs in accuracy: quantized alone, and all but it. The command `qswin sensitivity`."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from scipy.special import log_softmax
from torch import nn
from tqdm import tqdm

from calib.batches import Batch, image_batches
from calib.files import sha256, write_json
from calib.folders import draw_samples, scan_folder
from qat.checkpoint import Description, load_checkpoint
from qat.distributed import process_group
from qat.evaluate import TorchPredictor
from qat.quantizers import TensorQuantizer, quantizers
from trt import plots
from trt.evaluate import evaluate, main_metric

Groups = dict[str, list[TensorQuantizer]]


class Divergence:
    """Mean KL(reference || model) of the class distributions, over images or pixels. A trt.evaluate.Metric.

    Args:
        reference: logits of each batch, in the order in which the batches will come.
    """

    headline = {"kl": "KL"}

    def __init__(self, reference: Sequence[np.ndarray]) -> None:
        self._reference = iter(reference)
        self._total, self._count = 0.0, 0

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        expected, ours = (log_softmax(x.astype(np.float64), axis=1) for x in (next(self._reference), logits))
        divergence = (np.exp(expected) * (expected - ours)).sum(axis=1)
        self._total, self._count = self._total + float(divergence.sum()), self._count + divergence.size

    def result(self) -> dict[str, Any]:
        return {"kl": self._total / self._count}


class Probe:
    """Measures a calibrated model with some of its quantizers on, against itself with none."""

    def __init__(self, model: nn.Module, description: Description, batches: list[Batch], device: str) -> None:
        self.model, self.task, self.batches = model, description.task, batches
        self.classes = description.classes or ()
        self.predict = TorchPredictor(model, description, device)
        self.switch([])
        self.reference = [self.predict(batch.images) for batch in batches]

    def switch(self, quantized: Sequence[TensorQuantizer]) -> None:
        """Quantizes with these quantizers and no others."""
        for quantizer in quantizers(self.model):
            quantizer.off()
        for quantizer in quantized:
            quantizer.quantize()

    def measure(self, quantized: Sequence[TensorQuantizer]) -> dict[str, float]:
        """{"kl"} and the task's main metrics with these quantizers and no others."""
        self.switch(quantized)
        metric, divergence = main_metric(self.task, self.classes), Divergence(self.reference)
        result = evaluate(self.predict, self.batches, [metric, divergence])
        return {name: result[name] for name in (*metric.headline, "kl")}


def group_quantizers(model: nn.Module, by: str) -> Groups:
    """The quantizers that are switched together.

    Args:
        by: "site": an activation and the weight that it meets; "layer": all of one linear, matmul or residual add.

    Returns:
        {site, or the layer's path: its quantizers}, in the model's order.
    """
    groups: Groups = defaultdict(list)
    for path, module in model.named_modules():
        for child in module.children():
            if isinstance(child, TensorQuantizer):
                groups[child.site.removesuffix(".weight") if by == "site" else path].append(child)
    return dict(groups)


def measure_groups(probe: Probe, groups: Groups, report: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Fills `report["rows"]` with a row for each group, most harmful first, and saves it after each. Rows there are kept."""
    everything = list(quantizers(probe.model))
    done = {row["name"] for row in report["rows"]}
    for name in tqdm(groups, "sensitivity", disable=not sys.stderr.isatty()):
        if name in done:
            continue
        others = [quantizer for quantizer in everything if quantizer not in groups[name]]
        sites = sorted({quantizer.site.removesuffix(".weight") for quantizer in groups[name]})
        row = {"name": name, "sites": sites, "alone": probe.measure(groups[name]), "without": probe.measure(others)}
        report["rows"] = sorted([*report["rows"], row], key=lambda row: -row["alone"]["kl"])
        write_json(path, report)
    return report["rows"]


def start_report(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """An empty report, or the one that an interrupted run of the same job has left. Raises ValueError for another job's."""
    if not path.is_file():
        return {"job": job, "rows": []}
    try:
        report = json.loads(path.read_text())
        before, _ = report["job"], report["rows"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a sensitivity report; choose another --out, or delete it") from error
    for key, value in job.items():
        if before.get(key) != value:
            raise ValueError(f"{path}: of another job ({key} was {before.get(key)}, now {value}); choose another --out")
    return report


def table(report: dict[str, Any], rows: int) -> str:
    """The most sensitive groups, and the whole model for comparison."""
    lines = [f"{'':<40} {'alone: KL':>12} {'':>8} {'all but: KL':>12}"]
    values = [(row["name"], row["alone"], row["without"]) for row in report["rows"][:rows]]
    for name, alone, without in [*values, ("everything", report["all"], report["float"])]:
        metric = next(key for key in alone if key != "kl")
        lines.append(f"{name:<40} {alone['kl']:12.4g} {alone[metric]:8.4g} {without['kl']:12.4g} {without[metric]:8.4g}")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path, rows: int) -> None:
    """A bar for each of the most sensitive groups. Raises ValueError where matplotlib is missing."""
    shown = report["rows"][:rows]
    plots.save(lambda axes: plots.ranking(axes, shown), path, height=1 + 0.22 * len(shown))


def open_probe(args: argparse.Namespace, device: str) -> Probe:
    """The checkpoint, and the drawn images, of a command with `add_probe_arguments`. Raises ValueError."""
    model, description = load_checkpoint(args.checkpoint)
    if not any(quantizers(model)):
        raise ValueError(f"{args.checkpoint}: not quantized; run qswin calibrate first")
    folder = scan_folder(description.task, args.data, description.classes)
    samples = sorted(draw_samples(folder, args.images, args.seed))
    batches = list(image_batches(samples, description.preprocessing, args.batch_size, args.workers))
    return Probe(model, description, batches, device)


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_probe` reads."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="a calibrated one")
    parser.add_argument("--data", required=True, type=Path, help="folder of images, e.g. DIR/train")
    parser.add_argument("--images", type=int, default=256, help="drawn at random from the folder, and kept in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4, help="decoding processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Quantizes one site (or layer) at a time, and all but it, and ranks them by what that costs."
    parser.epilog = (
        "example:\n  qswin sensitivity --checkpoint runs/x/ptq.safetensors --data DIR/train --out runs/x/sensitivity.json"
    )
    add_probe_arguments(parser)
    parser.add_argument("--by", choices=("site", "layer"), default="site")
    parser.add_argument("--out", required=True, type=Path, help="JSON; an interrupted run goes on from it")
    parser.add_argument("--plot", type=Path, help="ranked bars as a picture")
    parser.add_argument("--top", type=int, default=40, help="rows of the table and the picture")


def main(args: argparse.Namespace) -> None:
    job = {"checkpoint": sha256(args.checkpoint), "images": args.images, "seed": args.seed, "by": args.by}
    report = start_report(args.out, {**job, "data": str(args.data)})
    with process_group(args.device) as ranks:
        probe = open_probe(args, str(ranks.device))
        if "all" not in report:
            report |= {"float": probe.measure([]), "all": probe.measure(list(quantizers(probe.model)))}
        measure_groups(probe, group_quantizers(probe.model, args.by), report, args.out)
    write_json(args.out, {**report, "command": sys.argv})
    print(table(report, args.top))
    if args.plot:
        plot(report, args.plot, args.top)
    logging.info("%s: %d rows", args.out, len(report["rows"]))


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.sensitivity")
