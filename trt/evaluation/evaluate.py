"""Accuracy, or Dice and HD95, of anything that maps images to logits. As a command: of an ONNX file, without torch."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from tqdm import tqdm

from qswin.calib.data.batches import Batch, ahead, image_batches
from qswin.calib.data.folders import scan_folder, spread_samples
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import write_json
from qswin.trt.evaluation.segmentation import Dice, Overlays, Volumes
from qswin.trt.evaluation.worst import WorstImages


class Predictor(Protocol):
    """A model in some backend: (N, 3, H, W) float32 -> (N, classes) float32, or (N, classes, H, W) of segmentation."""

    backend: str  # "onnxruntime 1.31.1"
    precision: str  # "int8"
    task: str  # classification or segmentation
    preprocessing: Preprocessing
    classes: list[str] | None
    batch_size: int | None

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


class Metric(Protocol):
    """What is counted over batches of logits."""

    headline: dict[str, str]  # result -> heading, of what is shown in a table

    def update(self, logits: np.ndarray, batch: Batch) -> None: ...

    def result(self) -> dict[str, Any]: ...


class CountingMetric(Metric, Protocol):
    """A metric that is a function of counts, which add up over processes."""

    counts: np.ndarray


class Accuracy:
    """Acc@1 and Acc@5, in per cent."""

    headline = {"acc1": "Acc@1", "acc5": "Acc@5"}

    def __init__(self) -> None:
        self.counts = np.zeros(3)  # images, right ones, right among five

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        self.counts += (len(batch.labels), *count_correct(logits, batch.labels))

    def result(self) -> dict[str, Any]:
        images, first, fifth = self.counts.tolist()
        return {"acc1": 100 * first / images, "acc5": 100 * fifth / images}


def main_metric(task: str, classes: Sequence[str]) -> CountingMetric:
    """What a model of a task is judged by."""
    return Dice(classes) if task == "segmentation" else Accuracy()


def count_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many labels are the highest logit, and how many are among the five highest.

    Of equal logits the class of the lowest index is the higher one, as in argmax: they are common where logits are INT8 or
    FP16, and were they all right, a model would score the more, the coarser its output is. NaN is never right.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.

    Raises:
        ValueError: a label is no class of the model.
    """
    if labels.max(initial=0) >= logits.shape[1]:
        raise ValueError(f"the images have a label {labels.max()}, but the model has {logits.shape[1]} classes")
    own = logits[np.arange(len(labels)), labels][:, None]
    equal_and_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    rank = (~(logits <= own) | equal_and_before).sum(axis=1)
    return int((rank < 1).sum()), int((rank < 5).sum())


def evaluate(
    predict: Callable[[np.ndarray], np.ndarray], batches: Iterable[Batch], metrics: Sequence[Metric]
) -> dict[str, Any]:
    """Runs `predict` over batches.

    Returns:
        The metrics' results, {"images"} and {"images_per_second"}, decoding included.

    Raises:
        ValueError: there were no images.
    """
    images, start = 0, time.perf_counter()
    for batch in ahead(iter(batches)):
        logits = predict(batch.images)
        for metric in metrics:
            metric.update(logits, batch)
        images += len(batch.labels)
    if not images:
        raise ValueError("evaluation saw 0 images; check the data folder")
    rate = images / (time.perf_counter() - start)
    results = {key: value for metric in metrics for key, value in metric.result().items()}
    return {**results, "images": images, "images_per_second": rate}


def evaluate_folder(predictor: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates over the folder `args.data` with the model's own preprocessing, shows progress and a table, writes JSON."""
    folder = scan_folder(predictor.task, args.data, predictor.classes)
    samples = spread_samples(folder, args.images)
    size = predictor.batch_size or args.batch_size
    skipped: list[ImageFile] | None = [] if args.skip_unreadable else None
    batches = image_batches(samples, predictor.preprocessing, size, args.workers, skipped)
    steps = -(-len(samples) // size)
    metrics = choose_metrics(predictor, folder.classes, args)
    result = evaluate(predictor, tqdm(batches, "evaluate", steps, disable=not sys.stderr.isatty()), metrics)
    kind = {"backend": predictor.backend, "precision": predictor.precision}
    report = {"model": str(args.model), **kind, "data": str(args.data), **result, "skipped": len(skipped or ())}
    print(table(report, {key: heading for metric in metrics for key, heading in metric.headline.items()}))
    if skipped:
        logging.warning("%d unreadable images skipped, the first is %s", len(skipped), skipped[0])
    if args.json:
        write_json(args.json, {**report, "command": sys.argv})
    return report


def choose_metrics(predictor: Predictor, classes: Sequence[str], args: argparse.Namespace) -> list[Metric]:
    """Everything that is measured of a model, and pictures of its worst cases on request."""
    metrics: list[Metric] = [main_metric(predictor.task, classes)]
    if predictor.task == "segmentation":
        metrics.append(Volumes(classes))
    if args.pictures:
        kind = Overlays if predictor.task == "segmentation" else WorstImages
        metrics.append(kind(args.pictures, args.worst, classes, predictor.preprocessing))
    return metrics


def table(report: dict[str, Any], headline: dict[str, str]) -> str:
    """A report as two lines, and one a class where there are results by class."""
    metrics = "".join(f" {heading:>7}" for heading in headline.values())
    values = "".join(f" {_number(report[key], 4 if key == 'dice' else 2):>7}" for key in headline)
    lines = [
        f"{'model':<32} {'backend':<20} {'precision':<9}{metrics} {'images':>7} {'images/s':>9}",
        f"{report['model']:<32} {report['backend']:<20} {report['precision']:<9}{values} {report['images']:7d}"
        f" {report['images_per_second']:9.1f}",
    ]
    lines += [f"  Dice of {name}: {value:.4f}" for name, value in report.get("dice_per_class", {}).items()]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def open_predictor(path: Path, threads: int = 0) -> Predictor:
    """An ONNX file or an engine, ready to run. Raises ValueError for a file of another kind."""
    if path.suffix == ".onnx":
        from qswin.trt.graphs.runtime import OnnxRuntimePredictor

        return OnnxRuntimePredictor(path, threads)
    from qswin.trt.engines.engine import SUFFIXES, Engine

    if path.suffix in SUFFIXES:
        return Engine(path)
    raise ValueError(
        f"{path}: not an .onnx file or an engine ({', '.join(SUFFIXES)}); checkpoints need torch: qswin evaluate"
    )
