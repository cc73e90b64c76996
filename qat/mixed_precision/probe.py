"""A probe: a calibrated model measured with some of its quantizers on, against itself with none."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from scipy.special import log_softmax
from torch import nn

from qswin.calib.data.batches import Batch, image_batches, warn_of_skipped
from qswin.calib.data.folders import Sample, draw_samples, scan_with_labels_if_any
from qswin.calib.data.shards import ImageFile
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Loaded, open_checkpoint
from qswin.qat.plan import check_readable, model_fact, sites_fact
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.trt.evaluation.evaluate import Metric, evaluate, main_metric

Groups = dict[str, list[TensorQuantizer]]


@dataclasses.dataclass(frozen=True)
class ProbeImages:
    """The images that a probe is measured on: `images` of the folder `data`, drawn by `seed`, kept in memory."""

    data: Path
    images: int = 256
    seed: int = 0
    batch_size: int = 32
    workers: int | None = None
    skip_unreadable: bool = False


class Divergence:
    """Mean KL(reference || model) of class distributions, over images or pixels. A metric of trt.evaluation.evaluate.

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
    """Measures a calibrated model with some of its quantizers on, against itself with none.

    Args:
        unlabelled: why the batches have no labels of this model; the KL is all that is measured then. None: they have.
    """

    def __init__(self, loaded: Loaded, batches: list[Batch], device: str, unlabelled: str | None = None) -> None:
        self.model, self.description, self.sha256 = loaded
        self.task, self.classes, self.batches = self.description.task, self.description.classes or (), batches
        self.unlabelled = unlabelled
        self.predict = TorchPredictor(self.model, self.description, device)
        self.switch([])
        self.reference = [self.predict(batch.images) for batch in batches]

    @property
    def metric(self) -> str:
        """The task's, where there are labels."""
        return next(iter(main_metric(self.task, self.classes).headline))

    def switch(self, quantized: Sequence[TensorQuantizer]) -> None:
        """Quantizes with these quantizers and no others."""
        for quantizer in quantizers(self.model):
            quantizer.disable(quiet=True)
        for quantizer in quantized:
            quantizer.enable()

    def measure(self, quantized: Sequence[TensorQuantizer]) -> dict[str, float]:
        """{"kl"}, and before it the task's main metrics where there are labels, with these quantizers and no others."""
        self.switch(quantized)
        labelled = [] if self.unlabelled else [main_metric(self.task, self.classes)]
        metrics: list[Metric] = [*labelled, Divergence(self.reference)]
        result = evaluate(self.predict, self.batches, metrics)
        return {name: result[name] for metric in metrics for name in metric.headline}


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
                groups[child.recipe_site if by == "site" else path].append(child)
    return dict(groups)


class Drawn(NamedTuple):
    """A checkpoint and the images that it will be probed on; see `Probe` for why they may be without labels."""

    loaded: Loaded
    samples: list[Sample]
    unlabelled: str | None


def draw_probe(checkpoint: Path, images: ProbeImages) -> Drawn:
    """Loads a calibrated checkpoint and draws its images.

    Raises:
        FileNotFoundError: the checkpoint or the folder is missing.
        ValueError: the checkpoint is not quantized, or it is a backbone.
    """
    model, description, _ = loaded = open_checkpoint(checkpoint)
    if not any(quantizers(model)):
        raise ValueError(f"{checkpoint}: not quantized; run qswin calibrate first")
    main_metric(description.task, ())  # a backbone has none, and no class distribution either
    folder, unlabelled = scan_with_labels_if_any(description.task, images.data, description.classes)
    if unlabelled:
        logging.info("%s: without labels, KL against the float model is measured", unlabelled)
    return Drawn(loaded, sorted(draw_samples(folder, images.images, images.seed)), unlabelled)


def open_probe(checkpoint: Path, images: ProbeImages, device: str) -> Probe:
    """A probe of a calibrated checkpoint. Raises as `draw_probe` does, and ValueError for an unreadable image."""
    loaded, samples, unlabelled = draw_probe(checkpoint, images)
    skipped: list[ImageFile] | None = [] if images.skip_unreadable else None
    preprocessing = loaded.description.preprocessing
    batches = list(image_batches(samples, preprocessing, images.batch_size, images.workers, skipped))
    warn_of_skipped(skipped)
    return Probe(loaded, batches, device, unlabelled)


def probe_facts(drawn: Drawn, checkpoint: Path, images: ProbeImages, by: str, device: object) -> dict[str, str]:
    """What a job that probes would work on, for its plan. Every image is decoded: ValueError for one that cannot be."""
    model, description, _ = drawn.loaded
    size = description.preprocessing
    readable = check_readable(drawn.samples, size, images.batch_size, images.workers, images.skip_unreadable)
    labels = "labelled" if drawn.unlabelled is None else f"without labels ({drawn.unlabelled})"
    return {
        "model": model_fact(description.model, model, size, checkpoint),
        "groups": f"{len(group_quantizers(model, by))}, by {by}: {sites_fact(model)}",
        "images": f"{readable} of {images.data}, {labels}",
        "device": str(device),
    }
