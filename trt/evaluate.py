"""Acc@1 and Acc@5 of anything that maps images to logits. As a command: of an ONNX file, on a machine without torch."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from tqdm import tqdm

from calib.files import write_json
from calib.images import Batch, Preprocessing, image_batches, scan_image_folder


class Predictor(Protocol):
    """A model in some backend: (N, 3, H, W) float32 -> (N, classes) float32."""

    backend: str  # "onnxruntime 1.31.1"
    precision: str  # "int8"
    preprocessing: Preprocessing
    classes: list[str] | None
    batch_size: int | None

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


def count_correct(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many labels are the highest logit, and how many are among the five highest.

    A label's rank is the number of logits above its own, so that equal logits all count as right; NaN never does.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.

    Raises:
        ValueError: a label is no class of the model.
    """
    if labels.max(initial=0) >= logits.shape[1]:
        raise ValueError(f"the images have a label {labels.max()}, but the model has {logits.shape[1]} classes")
    own = logits[np.arange(len(labels)), labels]
    rank = (~(logits <= own[:, None])).sum(axis=1)
    return int((rank < 1).sum()), int((rank < 5).sum())


def evaluate(predict: Callable[[np.ndarray], np.ndarray], batches: Iterable[Batch]) -> dict[str, float]:
    """Runs `predict` over batches.

    Returns:
        {"acc1", "acc5"} in per cent, {"images"} and {"images_per_second"}, decoding included.

    Raises:
        ValueError: there were no images.
    """
    images = top1 = top5 = 0
    start = time.perf_counter()
    for batch in batches:
        first, fifth = count_correct(predict(batch.images), batch.labels)
        images, top1, top5 = images + len(batch.labels), top1 + first, top5 + fifth
    if not images:
        raise ValueError("evaluation saw 0 images; check the data folder")
    rate = images / (time.perf_counter() - start)
    return {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "images": images, "images_per_second": rate}


def evaluate_folder(predictor: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates over the folder `args.data` with the model's own preprocessing, shows progress and a table, writes JSON."""
    folder = scan_image_folder(args.data, predictor.classes)
    samples = folder.samples[:: max(1, len(folder.samples) // args.images)] if args.images else folder.samples
    size = predictor.batch_size or args.batch_size
    skipped: list[Path] | None = [] if args.skip_unreadable else None
    batches = image_batches(samples, predictor.preprocessing, size, args.workers, skipped)
    steps = -(-len(samples) // size)
    result = evaluate(predictor, tqdm(batches, "evaluate", steps, disable=not sys.stderr.isatty()))
    kind = {"backend": predictor.backend, "precision": predictor.precision}
    report = {"model": str(args.model), **kind, "data": str(args.data), **result, "skipped": len(skipped or ())}
    print(f"{'model':<32} {'backend':<20} {'precision':<9} {'Acc@1':>7} {'Acc@5':>7} {'images':>7} {'images/s':>9}")
    print(
        f"{report['model']:<32} {predictor.backend:<20} {predictor.precision:<9} {report['acc1']:7.2f} {report['acc5']:7.2f}"
        f" {report['images']:7d} {report['images_per_second']:9.1f}"
    )
    if skipped:
        logging.warning("%d unreadable images skipped, the first is %s", len(skipped), skipped[0])
    if args.json:
        write_json(args.json, {**report, "command": sys.argv})
    return report


def open_predictor(path: Path, threads: int = 0) -> Predictor:
    """An ONNX file or an engine, ready to run. Raises ValueError for a file of another kind."""
    if path.suffix == ".onnx":
        from trt.onnx_runtime import OnnxRuntimePredictor

        return OnnxRuntimePredictor(path, threads)
    from trt.engine import SUFFIXES, Engine

    if path.suffix in SUFFIXES:
        return Engine(path)
    raise ValueError(
        f"{path}: not an .onnx file or an engine ({', '.join(SUFFIXES)}); checkpoints need torch: qswin evaluate"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Acc@1 and Acc@5 over a folder of images, one folder a class."
    parser.epilog = "example:\n  qswin evaluate --model runs/x/int8.onnx --data DIR/val --json runs/x/int8.json"
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint (.safetensors), an .onnx file or an engine")
    parser.add_argument("--data", required=True, type=Path, help="folder of class folders, e.g. DIR/val")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--images", type=int, default=0, help="evaluate about this many, evenly spread; 0: all")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4, help="decoding threads")
    parser.add_argument("--threads", type=int, default=0, help="compute threads of ONNX Runtime; 0: all cores")
    parser.add_argument("--skip_unreadable", action="store_true", help="count and skip files that cannot be read")


def main(args: argparse.Namespace) -> None:
    evaluate_folder(open_predictor(args.model, args.threads), args)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "trt.evaluate")
