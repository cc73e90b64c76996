"""Accuracy, or Dice and HD95, of anything that maps images to logits. No torch."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from qswin.calib.data.batches import Batch, ahead, image_batches, warn_of_skipped
from qswin.calib.data.folders import scan_folder, spread_samples
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.messages import text_of
from qswin.trt.evaluation.segmentation import Dice, Overlays, Volumes
from qswin.trt.evaluation.worst import WorstCases, WorstImages


class Predictor(Protocol):
    """A model in some backend: (N, 3, H, W) float32 -> (N, classes) float32, or (N, classes, H, W) of segmentation.

    A backbone's feature maps come as one array, (N, values), one map after the other.
    """

    backend: str  # "onnxruntime 1.31.1"
    precision: str  # "int8"
    task: str  # classification, segmentation or features
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
    """Acc@1 and Acc@5, in per cent; and the standard error of Acc@1, sqrt(p (1 - p) / images) of a share p."""

    headline = {"acc1": "Acc@1", "acc5": "Acc@5"}

    def __init__(self) -> None:
        self.counts = np.zeros(3)  # images, right ones, right among five

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        self.counts += (len(batch.labels), *count_correct(logits, batch.labels))

    def result(self) -> dict[str, Any]:
        images, first, fifth = self.counts.tolist()
        error = math.sqrt(first * (images - first) / images**3)
        return {"acc1": 100 * first / images, "acc5": 100 * fifth / images, "acc1_error": 100 * error}


def main_metric(task: str, classes: Sequence[str]) -> CountingMetric:
    """What a model of a task is judged by. Raises ValueError for a backbone, which gives feature maps."""
    if task == "features":
        what = "a backbone has no accuracy of its own: judge the detector or segmentor that it is for"
        raise ValueError(f"{what}, or take qswin compare, which needs no labels")
    return Dice(classes) if task == "segmentation" else Accuracy()


def count_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many labels are the highest logit, and how many are among the five highest.

    Of equal logits the class of lowest index is the higher one, as in argmax: they are common where logits are INT8 or
    FP16, and were they all right, a model would score the more, the coarser its output is. NaN is never right.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.

    Raises:
        ValueError: a label is not a class of the model.
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


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated over a folder.

    Attributes:
        images: evaluate this many, evenly spread; 0 for all.
        batch_size: of models that take any.
        workers: decoding processes; None for one a core.
        skip_unreadable: count and skip the files that cannot be read.
        pictures: a folder for pictures of the worst images.
        worst: how many pictures.
    """

    images: int = 0
    batch_size: int = 32
    workers: int | None = None
    skip_unreadable: bool = False
    pictures: Path | None = None
    worst: int = 8


def evaluate_folder(
    model: Path, predictor: Predictor, data: Path, options: EvaluationOptions
) -> tuple[dict[str, Any], WorstCases | None]:
    """Evaluates over a folder with the model's own preprocessing; shows progress and a table.

    Args:
        model: the predictor's file, as the table names it.
        data: laid out as `qswin.calib.data.folders.scan_folder` says.

    Returns:
        What the table shows, and more. The worst cases, where pictures of them are asked for: `draw` writes these.
    """
    folder = scan_folder(predictor.task, data, predictor.classes)
    samples = spread_samples(folder, options.images)
    size = predictor.batch_size or options.batch_size
    skipped: list[ImageFile] | None = [] if options.skip_unreadable else None
    batches = image_batches(samples, predictor.preprocessing, size, options.workers, skipped)
    steps = -(-len(samples) // size)
    metrics = choose_metrics(predictor, folder.classes)
    worst = _worst_cases(predictor, folder.classes, options)
    if worst is not None:
        metrics.append(worst)
    result = evaluate(predictor, tqdm(batches, "evaluate", steps, disable=not sys.stderr.isatty()), metrics)
    kind = {"backend": predictor.backend, "precision": predictor.precision}
    report = {"model": str(model), **kind, "data": str(data), **result, "skipped": len(skipped or ())}
    print(table(report, {key: heading for metric in metrics for key, heading in metric.headline.items()}))
    warn_of_skipped(skipped)
    return report, worst


def choose_metrics(predictor: Predictor, classes: Sequence[str]) -> list[Metric]:
    """Everything that is measured of a model."""
    metrics: list[Metric] = [main_metric(predictor.task, classes)]
    if predictor.task == "segmentation":
        metrics.append(Volumes(classes))
    return metrics


def _worst_cases(predictor: Predictor, classes: Sequence[str], options: EvaluationOptions) -> WorstCases | None:
    if options.pictures is None:
        return None
    kind = Overlays if predictor.task == "segmentation" else WorstImages
    return kind(options.pictures, options.worst, classes, predictor.preprocessing)


def table(report: dict[str, Any], headline: dict[str, str]) -> str:
    """A report as two lines, and one a class where there are results by class."""
    cells = {key: _cell(report, key) for key in headline}
    metrics = "".join(f" {heading:>{max(7, len(cells[key]))}}" for key, heading in headline.items())
    values = "".join(f" {cell:>7}" for cell in cells.values())
    lines = [
        f"{'model':<32} {'backend':<20} {'precision':<9}{metrics} {'images':>7} {'images/s':>9}",
        f"{report['model']:<32} {report['backend']:<20} {report['precision']:<9}{values} {report['images']:7d}"
        f" {report['images_per_second']:9.1f}",
    ]
    lines += [f"  Dice of {name}: {value:.4f}" for name, value in report.get("dice_per_class", {}).items()]
    return text_of(lines)


def _cell(report: dict[str, Any], key: str) -> str:
    """A metric, with its standard error where it has one: 76.25 +-2.13."""
    number = _number(report[key], 4 if key == "dice" else 2)
    return f"{number} +-{report[f'{key}_error']:.2f}" if f"{key}_error" in report else number


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
