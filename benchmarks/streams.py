"""The residual stream of a float model: the largest magnitude of each channel behind each block.

    python -m benchmarks.streams --config configs/vit_tiny_imagenet.yaml --data DIR/train --checkpoint FILE --out FILE

docs/make_streams.py draws docs/results/vit-streams.json.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import commit, device_name
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.calib.files import write_json
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model
from qswin.qat.quant.blocks import blocks
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import rewrite


def channel_maxima(model: torch.nn.Module, batches: list[Tensor]) -> list[list[float]]:
    """[block][channel], over the images and tokens of all batches."""
    twin = rewrite(model, RECIPES["none"])  # twins are what `blocks` knows
    found: dict[torch.nn.Module, Tensor] = {}

    def record(block: torch.nn.Module, _: tuple, output: Tensor) -> None:
        largest = output.abs().flatten(0, -2).amax(0)
        found[block] = torch.maximum(found.get(block, largest), largest)

    for block in blocks(twin):
        block.register_forward_hook(record)
    with torch.inference_mode():
        for batch in batches:
            twin(batch)
    return [found[block].tolist() for block in blocks(twin)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    settings = ["data.root=unused", "run=unused", f"model.checkpoint={args.checkpoint}", "model.pretrained=false"]
    config = load_config(args.config, settings)
    floating = build_float_model(config.model, config.data.preprocessing)
    model, preprocessing = floating.model, floating.preprocessing
    samples = draw_samples(scan_folder("classification", args.data), args.images, seed=0)
    batches = [torch.from_numpy(batch.images) for batch in image_batches(samples, preprocessing, 20, 0)]
    rows = [[round(value, 3) for value in block] for block in channel_maxima(model.eval(), batches)]
    about = {"model": config.model.name, "images": args.images, "commit": commit(), "device": device_name("cpu")}
    write_json(args.out, {**about, "date": time.strftime("%Y-%m-%d"), "largest": rows})


if __name__ == "__main__":
    main()
