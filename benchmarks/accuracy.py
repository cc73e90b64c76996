"""PTQ accuracy compared: ours piece by piece, two earlier recipes, NVIDIA ModelOpt, NNCF, ONNX Runtime's static one.

    pip install nvidia-modelopt requests nncf
    python -m benchmarks.accuracy --data DIR --checkpoint FILE --out docs/results/accuracy.json [--bits W8A8 W6A6]
    python -m benchmarks.accuracy --config configs/swin_unet_acdc.yaml --data DIR --checkpoint FILE --bits W8A8 W4A8 ...

Any model of a config; every toolkit gets the same checkpoint, calibration images and validation images. Rows that are
in the output file are kept. All run in torch but ONNX Runtime's, which has no other form.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
import torch
from torch import Tensor, nn

from benchmarks.results import commit, device_name, write_rows
from benchmarks.toolkits import Make, Predict, modelopt_rows, nncf_rows, onnxruntime_rows, widths
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.models.registry import family_of
from qswin.qat.checkpoint import Description
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.ptq.prediction import LOGITS, divergence
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule
from qswin.qat.quant.rewrite import quantize
from qswin.qat.schema import CalibrationConfig
from qswin.trt.evaluation.evaluate import main_metric

RECONSTRUCT_STEPS = 500
TOOLKITS = ("qswin", "modelopt", "nncf", "onnxruntime")
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}  # where they are not named as the toolkit is


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured."""

    toolkit: str
    recipe: str
    bits: str
    make: Make


def recipe_at(recipe: Recipe, bits: str, **changes: Any) -> Recipe:
    """A recipe at "W4A8" or in "FP8"."""
    if bits == "FP8":
        return recipe.in_format("fp8")
    weights, activations = widths(bits)
    return dataclasses.replace(recipe, weight_format=f"int{weights}", activation_format=f"int{activations}", **changes)


def first_system(bits: str) -> Recipe:
    """Histogram calibration, percentile 99.99, residual quantizers on."""
    return recipe_at(RECIPES["full"], bits, calibrator="percentile:99.99")


def faster_transformer(bits: str) -> Recipe:
    """Percentile 99.99, weights per tensor; softmax, LayerNorm and residual adds in float."""
    matmuls = tuple(Rule(f"attn.{name}", quantize=True) for name in "qkv")
    rules = (*RECIPES["gemm"].rules, *matmuls)
    return recipe_at(RECIPES["gemm"], bits, rules=rules, calibrator="percentile:99.99", per_channel=False)


def our_recipe(name: str, bits: str) -> Recipe:
    """A named recipe at other widths. Below 8 bits the ranges of weights are searched for."""
    weight_calibrator = "max" if bits == "W8A8" else "mse"
    return recipe_at(RECIPES[name], bits, weight_calibrator=weight_calibrator)


def unsigned_probabilities(recipe: Recipe) -> Recipe:
    """Softmax's levels are 0 to 255, at 8 bits; otherwise the recipe as it is."""
    if recipe.activation_format != "int8":
        return recipe
    return dataclasses.replace(recipe, rules=(*recipe.rules, Rule("attn.probs", activation_format="uint8")))


def our_rows(bits: str) -> dict[str, Make]:
    """The recipes as `qswin calibrate` does them, and with one piece less or more; in FP8 their ranges alone."""
    if bits == "FP8":  # with max ranges, and nothing else
        recipes = {name: our_recipe(name, bits) for name in ("gemm", "attention", "full")}
        return {name: functools.partial(_ranges_alone, recipe=recipe) for name, recipe in recipes.items()}
    plain, reconstructed = CalibrationConfig(equalize=False), CalibrationConfig(reconstruct_steps=RECONSTRUCT_STEPS)
    gemm, attention, full, auto = (our_recipe(name, bits) for name in ("gemm", "attention", "full", "auto"))
    variants = {
        "auto": (auto, CalibrationConfig()),
        "gemm": (gemm, CalibrationConfig()),
        "attention": (attention, CalibrationConfig()),
        "full": (full, CalibrationConfig()),
        "attention, unsigned probabilities": (unsigned_probabilities(attention), CalibrationConfig()),
        "gemm, not equalized": (gemm, plain),
        "attention, not equalized": (attention, plain),
        "gemm, reconstructed": (gemm, reconstructed),
        "attention, reconstructed": (attention, reconstructed),
    }
    earlier = {"first system": first_system(bits), "FasterTransformer": faster_transformer(bits)}
    ours = {
        name: functools.partial(_ours, recipe=recipe, options=options) for name, (recipe, options) in variants.items()
    }
    return ours | {name: functools.partial(_ranges_alone, recipe=recipe) for name, recipe in earlier.items()}


def _ours(model: nn.Module, images: list[Tensor], recipe: Recipe, options: CalibrationConfig) -> Predict:
    twin = quantize(model, recipe)
    calibrate(twin, images, options)
    return twin


def _ranges_alone(model: nn.Module, images: list[Tensor], recipe: Recipe) -> Predict:
    twin = quantize(model, recipe)
    find_ranges(twin, images)
    return twin


def rows_of(toolkit: str, bits: str, description: Description) -> dict[str, Make]:
    """{recipe: how it is made} of a toolkit at a pair of widths; empty where it cannot do them."""
    if toolkit == "onnxruntime":
        return onnxruntime_rows(bits, description)
    return {"qswin": our_rows, "modelopt": modelopt_rows, "nncf": nncf_rows}[toolkit](bits)


def planned(toolkits: list[str], columns: list[str], description: Description) -> Iterator[Row]:
    """The float model, then for each pair of widths all toolkits; reconstruction takes longest and comes last."""
    yield Row("torch", "float", "W32A32", lambda model, images: model)
    for bits in columns:
        rows = [
            Row(toolkit, recipe, bits, make)
            for toolkit in toolkits
            for recipe, make in rows_of(toolkit, bits, description).items()
        ]
        yield from sorted(rows, key=lambda row: "reconstructed" in row.recipe)


def version(toolkit: str) -> str:
    """Ours is the repository's, which need not be installed."""
    if toolkit == "qswin":
        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    return importlib.metadata.version(DISTRIBUTIONS.get(toolkit, toolkit))


class Bench:
    """The float model, the images on its device, and the rows that come of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}", "run=unused"]
        config = load_config(args.config, [*settings, "model.pretrained=false"])
        self.name = args.name or config.model.name
        floating = build_float_model(config.model, config.data.preprocessing)
        preprocessing = floating.preprocessing
        self.model = floating.model.to(args.device).eval()
        task = family_of(config.model.name).task
        training = scan_folder(task, args.data / "train")
        self.description = Description(floating.arguments, "float", preprocessing, training.classes)
        drawn = draw_samples(training, args.images, args.seed)
        calibrated = set(drawn)
        others = [sample for sample in training.samples if sample not in calibrated]
        samples = others if args.choosing else scan_folder(task, args.data / "val").samples
        self.batches = list(image_batches(samples[:: args.every], preprocessing, 64, args.workers))
        self.images = [torch.from_numpy(batch.images).to(args.device) for batch in self.batches]
        drawn_batches = image_batches(drawn, preprocessing, 32, args.workers)
        self.calibration = [torch.from_numpy(batch.images).to(args.device) for batch in drawn_batches]
        self.reference = self.logits(self.model)
        self.rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.is_file() else []

    @torch.no_grad()
    def logits(self, predict: Predict) -> list[Tensor]:
        return [predict(images).float().to(self.args.device) for images in self.images]

    def scores(self, logits: list[Tensor]) -> dict[str, float]:
        """The task's metrics; mean KL(float || model) and per cent of equal classes, over images or pixels."""
        metric = main_metric(self.description.task, self.description.classes or ())
        divergence, agreeing, count = 0.0, 0, 0
        for expected, found, batch in zip(self.reference, logits, self.batches, strict=True):
            metric.update(found.cpu().numpy(), batch)
            divergence += kl_sum(expected, found)
            equal = expected.argmax(1) == found.argmax(1)
            agreeing, count = agreeing + int(equal.sum()), count + equal.numel()
        result = metric.result()
        main = {name: round(result[name], 5) for name in metric.headline}
        return {**main, "kl": round(divergence / count, 6), "agreement": round(100 * agreeing / count, 3)}

    def measure(self, row: Row) -> None:
        """Adds a row to the file, unless it is there or not asked for."""
        what = {"toolkit": row.toolkit, "recipe": row.recipe, "bits": row.bits}
        key = {"model": self.name, **what, "stage": "ptq", "seed": self.args.seed}
        known = any(all(old[name] == value for name, value in key.items()) for old in self.rows)
        if known or not re.search(self.args.only, " ".join(what.values())):
            return
        torch.manual_seed(self.args.seed)
        start = time.perf_counter()
        predict = row.make(self.model, self.calibration)
        seconds = round(time.perf_counter() - start, 1)
        scores = self.scores(self.logits(predict))
        device = device_name("cpu" if row.toolkit == "onnxruntime" else self.args.device)
        images = {"images": sum(map(len, self.images)), "calibration_images": sum(map(len, self.calibration))}
        where = {"device": device, "commit": self.args.commit, "version": version(row.toolkit)}
        self.rows.append({**key, **scores, "seconds": seconds, **images, **where})
        print(f"{self.name} {row.bits} {row.toolkit} {row.recipe}: {scores} {seconds} s", flush=True)
        write_rows(self.args.out, self.rows)


@torch.no_grad()
def kl_sum(expected: Tensor, found: Tensor) -> float:
    """KL(expected || found) of the classes' distributions, summed over images or pixels. Logits (N, classes, ...)."""
    return float(divergence({LOGITS: found.double()}, {LOGITS: expected.double()}).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default="configs/swin_tiny_tinyimagenet.yaml")
    parser.add_argument("--name", help="the model's name in the rows, where it is not the config's")
    parser.add_argument("--bits", nargs="*", default=["W8A8", "W4A4", "W6A6", "W4A8", "FP8"])
    parser.add_argument("--toolkits", nargs="*", default=list(TOOLKITS), choices=TOOLKITS)
    parser.add_argument("--only", default="", help="a regular expression over 'TOOLKIT RECIPE BITS'")
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image only")
    parser.add_argument("--choosing", action="store_true", help="score on training images, not calibrated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--commit", default=commit())
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    bench = Bench(args)
    failed = 0
    for row in planned(args.toolkits, args.bits, bench.description):
        try:
            bench.measure(row)
        except Exception:  # noqa: BLE001 (a toolkit's error may be any; the other rows are measured all the same)
            failed += 1
            print(f"{bench.name} {row.bits} {row.toolkit} {row.recipe}: failed\n{traceback.format_exc()}", flush=True)
    if failed:
        raise SystemExit(f"{failed} rows failed; their errors are above")


if __name__ == "__main__":
    main()
