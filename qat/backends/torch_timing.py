"""Timing of torch models: by CUDA events on a GPU, also as a CUDA graph; by the wall clock elsewhere."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qswin.trt.evaluation.timing import Timer, wall_clock

if TYPE_CHECKING:
    from torch import Tensor


def captured(model: "Callable[[Tensor], Tensor]", images: "Tensor") -> "Callable[[Tensor], None]":
    """A model's forward as a CUDA graph; each call copies its input to where the graph reads it."""
    import torch

    static = images.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what a first run prepares must not become part of the graph
        for _ in range(3):
            model(static)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(static)

    def run(fresh: "Tensor") -> None:
        static.copy_(fresh)
        graph.replay()

    return run


def torch_timer(model: "Callable[[Tensor], Any]", images: "Tensor") -> Timer:
    """What times a model's forward of images on its device, by CUDA events on a GPU and by the wall clock elsewhere."""
    import torch

    if not images.is_cuda:
        return wall_clock(lambda: model(images))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timer() -> float:
        start.record()
        model(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timer
