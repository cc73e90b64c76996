"""The command `qswin bench`: checkpoints in torch, eager and compiled, beside engines and ONNX files."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trt import bench as engines
from trt.bench import Row, Timer, measure, rates, wall_clock

if TYPE_CHECKING:
    from torch import Tensor, nn

PRECISIONS = {"cuda": ("fp32", "fp16"), "cpu": ("fp32",)}


def bench_checkpoint(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """A checkpoint in torch: FP32 and, on a GPU, FP16, each eager and, with `args.compile`, under torch.compile."""
    import torch

    from qat.checkpoint import load_model
    from qat.distributed import process_group

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
                    images = torch.zeros(batch, 3, *description.preprocessing.size, device=device, dtype=dtype)
                    timer = _timer(model, images)
                    repeats = args.repeats if device.type == "cuda" else min(args.repeats, args.cpu_repeats)
                    row = {"model": path.name, "backend": backend, "precision": precision, "device": name}
                    yield row | rates(measure(timer, args.warmup if device.type == "cuda" else 1, repeats), batch)


def _timer(model: "nn.Module", images: "Tensor") -> Timer:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    engines.add_arguments(parser)
    parser.add_argument("--compile", action="store_true", help="also time checkpoints under torch.compile")
    parser.add_argument("--device", default="auto", help="of checkpoints: auto, cpu, cuda, ...")
    parser.add_argument("--config", help="for bare weights, which have no sidecar: the YAML file that describes them")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="over --config's")


def main(args: argparse.Namespace) -> None:
    engines.bench_models(args, {**engines.BENCHES, **dict.fromkeys((".safetensors", ".pth"), bench_checkpoint)})


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "qat.bench")
