"""How good masks are: Dice, HD95 by volume, and pictures of the worst slices. No torch.

Class 0 is the background; means leave it out. Mask pixels of 255 have no class and are not counted.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qswin.calib.data.batches import Batch
from qswin.trt.evaluation.worst import Case, WorstCases

IGNORED = 255
COLOURS = np.array([[230, 60, 60], [70, 180, 75], [70, 130, 230], [240, 200, 40], [170, 80, 200], [60, 200, 200]])


def pixel_classes(logits: np.ndarray) -> np.ndarray:
    """The most likely class of every pixel, -1 where a logit is NaN. (N, classes, H, W) -> (N, H, W)."""
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


def overlaps(predicted: np.ndarray, masks: np.ndarray, classes: int) -> np.ndarray:
    """Pixels a class has in both, in prediction and in mask: (3, classes). Raises ValueError for a foreign index."""
    known = masks != IGNORED
    predicted, masks = predicted[known], masks[known]
    if masks.max(initial=0) >= classes:
        raise ValueError(f"a mask has a class {masks.max()}, but the model has {classes} classes")
    both = masks[predicted == masks]
    return np.stack([np.bincount(part, minlength=classes) for part in (both, predicted[predicted >= 0], masks)])


def dice(counts: np.ndarray) -> np.ndarray:
    """2 |A and B| / (|A| + |B|) of each class, NaN for a class that is in neither. (3, classes) -> (classes,)."""
    both, predicted, true = counts
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + true)


def mean_dice(counts: np.ndarray) -> float:
    """Mean over the classes that there are, apart from the background; 1 where there are none and none is predicted."""
    scores = dice(counts)[1:]
    return 1.0 if np.isnan(scores).all() else float(np.nanmean(scores))


class Dice:
    """Dice of each class, its pixels pooled over all slices. A qswin.trt.evaluation.evaluate.Metric."""

    headline = {"dice": "Dice"}

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.counts = np.zeros((3, len(classes)))

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        self.counts += overlaps(pixel_classes(logits), batch.labels, len(self.classes))

    def result(self) -> dict[str, Any]:
        return {"dice": mean_dice(self.counts), "dice_per_class": _by_class(dice(self.counts), self.classes)}


class Volumes:
    """Dice and HD95 of each volume. Slices of one are named alike up to `slice` and a number; others stand alone.

    HD95 is the 95th percentile of the distances between the two surfaces, in voxels (medpy). It is left out where a
    volume or its prediction lacks a class: such a volume's Dice is 0.
    """

    headline = {"volume_hd95": "HD95"}

    def __init__(self, classes: Sequence[str]) -> None:
        try:
            from medpy.metric.binary import hd95
        except ImportError as error:
            raise ValueError("HD95 needs the medpy library: pip install 'qswin[segmentation]'") from error
        self.classes, self._hd95 = tuple(classes), hd95
        self._slices: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        for file, predicted, mask in zip(batch.files, pixel_classes(logits), batch.labels, strict=True):
            name, number = split_name(file.stem)
            self._slices[name].append((number, predicted.astype(np.int16), mask))

    def result(self) -> dict[str, Any]:
        scores, distances = zip(*map(self._score, self._slices.values()), strict=True)
        per_class = np.array([_mean(column) for column in np.array(distances).T], dtype=float)
        return {
            "volumes": len(scores),
            "volume_dice": _mean(np.array(scores)[:, 1:]),
            "volume_hd95": _mean(per_class[1:]),
            "volume_hd95_per_class": _by_class(per_class, self.classes),
        }

    def _score(self, slices: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, list[float]]:
        """Dice and HD95 of each class of one volume."""
        slices.sort(key=lambda part: part[0])
        mask = np.stack([part[2] for part in slices]).squeeze()
        predicted = np.where(mask == IGNORED, -1, np.stack([part[1] for part in slices]).squeeze())
        distances = [float("nan")]  # of the background
        for index in range(1, len(self.classes)):
            ours, true = predicted == index, mask == index
            distances.append(float(self._hd95(ours, true)) if ours.any() and true.any() else float("nan"))
        return dice(overlaps(predicted, mask, len(self.classes))), distances


def split_name(stem: str) -> tuple[str, int]:
    """A slice's volume and its place in it: patient005_frame01_slice_7 is ("patient005_frame01", 7)."""
    match = re.fullmatch(r"(.*?)[_-]?slice[_-]?(\d+)", stem)
    return (match[1], int(match[2])) if match else (stem, 0)


def _by_class(values: np.ndarray, classes: tuple[str, ...]) -> dict[str, float]:
    """The foreground's values by name; classes without a value are left out."""
    named = zip(classes[1:], values[1:].tolist(), strict=True)
    return {name: value for name, value in named if not np.isnan(value)}


def _mean(values: np.ndarray) -> float | None:
    """The mean of what is not NaN; None if nothing is."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


class Overlays(WorstCases):
    """The slices with the lowest Dice: input, mask and prediction side by side."""

    def cases(self, logits: np.ndarray, batch: Batch) -> Iterator[Case]:
        for file, predicted, mask in zip(batch.files, pixel_classes(logits), batch.labels, strict=True):
            yield Case(mean_dice(overlaps(predicted, mask, len(self.classes))), file, mask, predicted)

    def picture(self, case: Case, pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([pixels, paint(pixels, case.label), paint(pixels, case.predicted)], axis=1)

    def caption(self, case: Case) -> str:
        return f"input, mask, prediction; Dice {case.score:.2f}; {case.file.stem}"


def paint(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with its foreground classes half covered in colours. (H, W, 3) and (H, W) -> (H, W, 3) uint8."""
    covered = (mask > 0) & (mask != IGNORED)
    colours = COLOURS[(mask - 1) % len(COLOURS)]
    return np.where(covered[..., None], (image.astype(np.int64) + colours) // 2, image).astype(np.uint8)
