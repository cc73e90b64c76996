"""Swin in INT8 and FP8 by the project's kernels beside PyTorch in FP16, on a GPU: images/s, what each kernel takes.

    python -m benchmarks.speed --out speed.json [--models swin_tiny_patch4_window7_224 ...] [--batch-sizes 1 64 256]

Weights are random: time does not depend on them. Before anything is timed, a lowered model on the GPU is compared with
its kernels' references on the CPU. Times are medians by CUDA events; inputs rotate, so they do not stay in the cache.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import commit, device_name
from qswin.calib.files import write_json
from qswin.models.registry import build_model
from qswin.qat.backends.torch_timing import captured
from qswin.qat.lowering.lower import lower
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize

Run = Callable[[Tensor], Any]
ROTATED = 4  # inputs that take turns


FORMATS = {"int8": "attention", "fp8": "attention-fp8"}  # and the recipe of each


def pair(name: str, formats: list[str], device: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The float model in FP16, and {format: the lowered one}, calibrated on noise."""
    torch.manual_seed(0)
    model = build_model(name).to(device).eval()
    size = model.patch_embed.img_size
    images = torch.randn(16, 3, *size, device=device)
    lowered = {}
    for each in formats:
        twin = quantize(model, named_recipe(FORMATS[each])).eval()
        find_ranges(twin, [images])
        lowered[each] = lower(twin, images[:1], torch.float16)
    return copy.deepcopy(model).half(), lowered


@torch.inference_mode()
def check(lowered: nn.Module, size: tuple[int, int]) -> dict[str, float]:
    """The logits on the device against those of the kernels' references: relative errors."""
    images = torch.randn(2, 3, *size)
    expected = reference(lowered, images)
    found = lowered(images.half().to(next(lowered.parameters()).device)).float().cpu()
    error = (found - expected).abs()
    return {"mean": float(error.mean() / expected.abs().mean()), "max": float(error.max() / expected.abs().max())}


def reference(lowered: nn.Module, images: Tensor) -> Tensor:
    """The same model on the CPU, where each operator is its reference; its floats in float32."""
    model = copy.deepcopy(lowered).cpu()
    model.patch_embed.dtype = torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model(images)


def time_calls(run: Run, inputs: list[Tensor], warmup: int, repeats: int) -> float:
    """Median milliseconds of a call, inputs taking turns."""
    turns = itertools.cycle(inputs)
    for _ in range(warmup):
        run(next(turns))
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(next(turns))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def backends(
    model: nn.Module, lowered: dict[str, nn.Module], images: Tensor, modes: list[str]
) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """(backend, precision, what makes the function that runs a batch)."""
    for mode in modes:
        yield f"torch.compile {mode}, CUDA graph", "fp16", lambda: captured(compiled(model, images, mode), images)  # noqa: B023
    yield "torch eager", "fp16", lambda: model
    yield "torch eager, CUDA graph", "fp16", lambda: captured(model, images)
    for precision, twin in lowered.items():
        yield "qswin kernels", precision, lambda: twin  # noqa: B023
        yield "qswin kernels, CUDA graph", precision, lambda: captured(twin, images)  # noqa: B023
    if importlib.util.find_spec("torchao"):
        name = f"torch.compile {modes[0]} + torchao, CUDA graph"
        yield name, "int8", lambda: captured(torchao(model, images, modes[0]), images)


def compiled(model: nn.Module, images: Tensor, mode: str) -> nn.Module:
    torch._dynamo.reset()
    model = torch.compile(copy.deepcopy(model), mode=mode)
    model(images)
    return model


def torchao(model: nn.Module, images: Tensor, mode: str) -> nn.Module:
    """Linear layers in INT8, inputs quantized row by row at run time; without torchao's search by coordinate descent.

    That search over every kernel did not end in 7 minutes. Products and their scales are fused as torchao wants them.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with torch._inductor.config.patch(force_fuse_int_mm_with_mul=True):
        return compiled(model, images, mode)


def kernel_times(lowered: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Each operator of a lowered model by shape: calls, GPU time, and what it achieves."""
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as trace,
    ):
        lowered(images)
        torch.cuda.synchronize()
    rows = []
    for event in trace.key_averages(group_by_input_shape=True):
        operator = event.key.removeprefix("qswin::")
        if operator != event.key:
            moved, operations = (event.count * number for number in cost(operator, event.input_shapes, len(images)))
            seconds = event.device_time_total / 1e6
            rates = {"tb_per_second": moved / seconds / 1e12, "tops": operations / seconds / 1e12}
            row = {"operator": operator, "shapes": event.input_shapes[:2], "calls": event.count, "ms": 1000 * seconds}
            rows.append({**row, **rates})
    return sorted(rows, key=lambda row: -row["ms"])


def cost(operator: str, shapes: list[list[int]], batch: int) -> tuple[float, float]:
    """Bytes that a call must move, the residual stream being FP16, and operations (two a product)."""
    first, second = shapes[:2]
    size = math.prod(first)
    if operator == "patch_embed":  # (B, 3, H, W), (C, 3, side, side)
        pixels_of_patch, out = math.prod(second[1:]), size // math.prod(second[1:]) * second[0]
        return 2 * size + 2 * out, 2 * out * pixels_of_patch
    if operator in ("norm_quantize", "gather_quantize"):
        return 3 * size, 0
    if operator == "norm_add":
        return 6 * size, 0
    if operator == "window_attention":  # (rows, 3 C), (masks, heads, tokens, padded) or none: of a whole image
        tokens = second[2] if second else first[0] // batch
        return size + size // 3 + (2 * math.prod(second) if second else 0), 4 * tokens * size // 3
    rows, columns = first[0], second[0]  # linear: (M, K), (N, K)
    result = {"linear_float": 2, "linear_add": 4}.get(operator, 1)
    return size + math.prod(second) + result * rows * columns, 2 * size * columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--models", nargs="*", default=["swin_tiny_patch4_window7_224"])
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[1, 64, 256])
    parser.add_argument(
        "--modes", nargs="+", default=["max-autotune-no-cudagraphs", "default"], help="of torch.compile"
    )
    parser.add_argument("--formats", nargs="+", default=["int8", "fp8"], choices=FORMATS)
    parser.add_argument("--only", default="", help="backends whose names hold this")
    parser.add_argument("--no-check", action="store_true", help="the references take a minute for large models")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    kernels: dict[str, list[dict[str, Any]]] = {}
    for name in args.models:
        model, lowered = pair(name, args.formats, "cuda")
        size = model.patch_embed.img_size
        for precision, twin in lowered.items():
            if not args.no_check:
                errors = json.dumps(check(twin, size))
                print(name, precision, "relative errors against the references:", errors, flush=True)
        for batch in args.batch_sizes:
            inputs = [torch.randn(batch, 3, *size, device="cuda", dtype=torch.float16) for _ in range(ROTATED)]
            with torch.inference_mode():
                for backend, precision, make in backends(model, lowered, inputs[0], args.modes):
                    if args.only not in backend:
                        continue
                    ms = time_calls(make(), inputs, args.warmup, args.repeats)
                    what = {"model": name, "backend": backend, "precision": precision, "batch": batch}
                    rates = {"ms": round(ms, 4), "images_per_second": round(1000 * batch / ms, 1)}
                    rows.append({**what, **rates, "device": device_name("cuda"), "commit": args.commit})
                    print(
                        f"{batch:4d} {backend:<44} {precision} {ms:9.3f} ms {1000 * batch / ms:9.1f} images/s",
                        flush=True,
                    )
                    write_json(args.out, {"rows": rows, "kernels": kernels})
            for precision, twin in lowered.items():
                key = f"{name}@{batch}" if precision == "int8" else f"{name}@{batch}, {precision}"
                kernels[key] = kernel_times(twin, inputs[0])
                for row in kernels[key]:
                    print(
                        f"     {precision} {row['operator']:<24} {row['calls']:3d} {row['ms']:8.3f} ms"
                        f" {row['tb_per_second']:6.2f} TB/s {row['tops']:6.0f} TOPS {row['shapes']}",
                        flush=True,
                    )
            write_json(args.out, {"rows": rows, "kernels": kernels})


if __name__ == "__main__":
    main()
