"""The command `qswin bench`: checkpoints in torch, eager and compiled, and packages, beside engines and ONNX files."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from qswin.calib.data.images import noise_images
from qswin.qat.backends.inductor import Package
from qswin.trt.evaluation.timing import Row, Timer, measure, rates, wall_clock

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = {"cuda": ("fp32", "fp16"), "cpu": ("fp32",)}


def bench_checkpoint(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """A checkpoint in torch: FP32 and, on a GPU, FP16, each eager and, with `args.compile`, under torch.compile."""
    import torch

    from qswin.qat.checkpoint import load_model
    from qswin.qat.distributed import process_group

    with process_group(args.device) as ranks, torch.inference_mode():
        device = ranks.device
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        for precision in PRECISIONS[device.type]:
            dtype = torch.float16 if precision == "fp16" else torch.float32
            model, description = load_model(path, args.config, args.overrides)
            model = model.to(device, dtype)
            for backend in ("torch", "torch.compile") if args.compile else ("torch",):
                if backend == "torch.compile":
                    model.compile(mode="max-autotune-no-cudagraphs")
                for batch in batches:
                    images = torch.from_numpy(noise_images(batch, description.preprocessing)).to(device, dtype)
                    timer = _timer(model, images)
                    repeats = args.repeats if device.type == "cuda" else min(args.repeats, args.cpu_repeats)
                    row = {"model": path.name, "backend": backend, "precision": precision, "device": name}
                    yield row | rates(measure(timer, args.warmup if device.type == "cuda" else 1, repeats), batch)


def bench_package(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """A package of the target inductor, by CUDA events; also as a CUDA graph where `args.cuda_graph` asks for it."""
    import torch

    package = Package(path)
    row = {"model": path.name, "backend": package.backend, "precision": "int8", "device": torch.cuda.get_device_name()}
    for batch in batches:
        if not package.smallest <= batch <= package.largest:
            logging.warning("%s: skips batch %d, outside its %d to %d", path, batch, package.smallest, package.largest)
            continue
        images = torch.from_numpy(noise_images(batch, package.preprocessing)).cuda()
        yield row | rates(measure(_timer(package.run, images), args.warmup, args.repeats), batch)
        if args.cuda_graph:
            timer = _timer(captured(package.run, images), images)
            row_of_graph = row | {"backend": f"{package.backend}, CUDA graph"}
            yield row_of_graph | rates(measure(timer, args.warmup, args.repeats), batch)


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


def _timer(model: "Callable[[Tensor], Any]", images: "Tensor") -> Timer:
    """By CUDA events on a GPU, by the wall clock elsewhere."""
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
