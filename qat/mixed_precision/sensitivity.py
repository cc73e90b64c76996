"""How much each site costs in accuracy: quantized alone, and all but it. The command `qswin sensitivity`."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import nn
from tqdm import tqdm

from qswin.calib.data.batches import Batch, image_batches
from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.calib.files import write_json
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Description, load_checkpoint
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.trt.evaluation.evaluate import evaluate, main_metric
from qswin.trt.report import plots

Groups = dict[str, list[TensorQuantizer]]


class Divergence:
    """Mean KL(reference || model) of the class distributions, over images or pixels. A qswin.trt.evaluation.evaluate.Metric.

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
            quantizer.off(quiet=True)
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
