"""Pictures of what a model gets most wrong. No torch."""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.special import softmax

from qswin.calib.data.batches import Batch
from qswin.calib.data.images import CAPTION, Preprocessing, load_pixels
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import write_atomic


class Case(NamedTuple):
    """One image: how good the answer is, 0 to 1, and what is told of it."""

    score: float
    file: ImageFile
    label: np.ndarray  # () class index, or (H, W) of them
    predicted: np.ndarray  # as the label


class WorstCases(ABC):
    """Pictures of the `count` images with the lowest scores, named by them. A qswin.trt.evaluation.evaluate.Metric."""

    headline: dict[str, str] = {}

    def __init__(self, folder: Path, count: int, classes: Sequence[str], preprocessing: Preprocessing) -> None:
        self.folder, self.count, self.classes, self.preprocessing = folder, count, tuple(classes), preprocessing
        self._worst: list[Case] = []

    @abstractmethod
    def cases(self, logits: np.ndarray, batch: Batch) -> Iterator[Case]:
        """Every image of a batch."""

    @abstractmethod
    def picture(self, case: Case, pixels: np.ndarray) -> np.ndarray:
        """What is drawn of a case. (H, W, 3) uint8, as the model sees it -> (H', W', 3) uint8."""

    @abstractmethod
    def caption(self, case: Case) -> str:
        """What the picture shows, in words. The PNG holds it as its description."""

    def name(self, case: Case) -> str:
        """Of the picture's file, without the suffix."""
        return f"{case.score:.4f}_{case.file.stem}"

    def update(self, logits: np.ndarray, batch: Batch) -> None:
        found = [*self._worst, *self.cases(logits, batch)]
        self._worst = sorted(found, key=lambda case: (case.score, case.file))[: self.count]

    def result(self) -> dict[str, Any]:
        return {"pictures": str(self.folder)}

    def draw(self) -> None:
        """Writes the pictures. Raises OSError when one cannot be written."""
        for case in self._worst:
            png, text = io.BytesIO(), PngInfo()
            text.add_itxt(CAPTION, self.caption(case))
            drawn = Image.fromarray(self.picture(case, load_pixels(case.file, self.preprocessing)))
            drawn.save(png, "PNG", pnginfo=text)
            write_atomic(self.folder / f"{self.name(case)}.png", png.getvalue())


class WorstImages(WorstCases):
    """The images whose own class has the lowest probability, named by it, the class and what it was taken for."""

    def cases(self, logits: np.ndarray, batch: Batch) -> Iterator[Case]:
        own = softmax(logits.astype(np.float64), axis=1)[np.arange(len(batch.labels)), batch.labels]
        scores = np.nan_to_num(own, nan=0.0).tolist()
        return map(Case, scores, batch.files, batch.labels, logits.argmax(axis=1))

    def picture(self, case: Case, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def caption(self, case: Case) -> str:
        label, predicted = (self.classes[index] for index in (case.label, case.predicted))
        return f"true {label} (p = {case.score:.2f}), predicted {predicted}; {case.file.stem}"

    def name(self, case: Case) -> str:
        label, predicted = (re.sub(r"[^\w.-]+", "-", self.classes[index]) for index in (case.label, case.predicted))
        return f"{case.score:.4f}_{label}_as_{predicted}_{case.file.stem}"
