"""A training step in bf16 on a GPU, float and quantized, eager and under torch.compile, beside NVIDIA ModelOpt's.

    pip install nvidia-modelopt
    python -m benchmarks.qat_speed --out docs/results/qat-speed.json [--batch 128] [--repeats 20]

Random weights and images cost what trained ones do. A step is forward, backward and AdamW; medians by CUDA events.
ModelOpt quantizes the weighted layers (its INT8 default), as our `gemm` does; `full` adds attention and residuals.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import commit, device_name
from benchmarks.speed import time_calls
from qswin.calib.files import write_json
from qswin.models.registry import build_model
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize


def models(name: str, images: Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """(what it is, what makes it)."""
    torch.manual_seed(0)
    model = build_model(name).to(images.device)
    yield "float", lambda: copy.deepcopy(model)
    for recipe in ("gemm", "full"):
        yield f"qswin {recipe}", lambda recipe=recipe: ours(model, recipe, images)
    yield "modelopt", lambda: theirs(model, images)


def ours(model: nn.Module, recipe: str, images: Tensor) -> nn.Module:
    twin = quantize(model, named_recipe(recipe))
    find_ranges(twin, [images])
    return twin


def theirs(model: nn.Module, images: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda peer: peer(images))


def training_step(model: nn.Module, device: str) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)

    def step(images: Tensor) -> None:
        labels = torch.arange(len(images), device=device) % 1000
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[Tensor], None], images: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds and peak memory of a step, after five to warm up."""
    for _ in range(5):
        step(images)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ms = time_calls(step, [images], warmup=0, repeats=repeats)
    return {"ms": ms, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--modes", nargs="*", default=["eager", "torch.compile"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, 224, 224, device="cuda")
    what = {"model": args.model, "batch": args.batch, "dtype": "bf16", "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    for name, make in models(args.model, images[:16]):
        if args.only and name not in args.only:
            continue
        for mode in args.modes:
            model = make().train()
            if mode != "eager":
                model.compile()
            found = measure(training_step(model, "cuda"), images, args.repeats)
            rate = round(1000 * args.batch / found["ms"], 1)
            row = {"training": name, "mode": mode, "images_per_second": rate}
            rows.append({**what, **row, **{key: round(value, 3) for key, value in found.items()}})
            print(row, f"{found['ms']:.1f} ms, {found['peak_gb']:.2f} GB", flush=True)
            write_json(args.out, {"rows": rows, "device": device_name("cuda"), "commit": args.commit})
            del model
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
