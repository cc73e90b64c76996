"""Timing of what is enqueued on a CUDA stream: TensorRT's engines, bundles."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from qswin.trt.engines.cuda import Stopwatch, captured
from qswin.trt.evaluation.timing import CUDA_GRAPH, Timer


class OnStream(Protocol):
    """A model with its input on the GPU. `stream` is the CUDA stream's address."""

    stream: int

    def load(self, images: np.ndarray) -> None:
        """Copies a batch (N, 3, H, W) float32 to the GPU."""

    def enqueue(self) -> None:
        """Puts one inference of the loaded batch on the stream."""


def event_timers(
    model: OnStream, watch: Stopwatch, images: np.ndarray, cuda_graph: bool
) -> Iterator[tuple[str, Timer]]:
    """The timers of a `Subject` by CUDA events on the model's stream, of which `watch` is."""
    model.load(images)
    yield "", lambda: watch.time(model.enqueue)
    if cuda_graph:
        with captured(model.enqueue, model.stream) as launch:
            yield CUDA_GRAPH, lambda: watch.time(launch)
