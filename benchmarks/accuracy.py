"""PTQ accuracy compared: ours piece by piece, NVIDIA ModelOpt, ONNX Runtime's static quantization, two earlier recipes.

    pip install nvidia-modelopt requests
    python -m benchmarks.accuracy --data DIR --checkpoint FILE --out docs/results/accuracy.json [--bits W8A8 W6A6]
    python -m benchmarks.accuracy --config configs/swin_unet_acdc.yaml --data DIR --checkpoint FILE --bits W8A8 W4A8 ...

Swin-T on Tiny-ImageNet, or Swin-Unet on ACDC; every toolkit gets the same checkpoint, calibration images and validation
images. Rows that are in the output file are kept. All run in torch but ONNX Runtime's, which has no other form; it
knows 8 bits only.
"""

import argparse
import copy
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.results import commit, device_name, write_rows
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import draw_samples, scan_folder
from qswin.models.registry import family_of
from qswin.qat.backends.torch_predictor import TorchPredictor
from qswin.qat.checkpoint import Description
from qswin.qat.config import load_config
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.float_model import build_float_model, model_arguments
from qswin.qat.mixed_precision.probe import Divergence
from qswin.qat.ptq.calibrate import calibrate
from qswin.qat.quant.recipe import RECIPES, Recipe, Rule
from qswin.qat.quant.rewrite import quantize
from qswin.qat.schema import CalibrationConfig
from qswin.trt.evaluation.evaluate import evaluate, main_metric

RECONSTRUCTION = {"reconstruct_steps": 500}
ONNX_RUNTIME_IMAGES = 128
ONNX_RUNTIME_STRIDE = 2  # batches of 8 at a time: it holds what every operator gives for all of them


def recipe_at(recipe: Recipe, bits: str, **changes: Any) -> Recipe:
    weights, activations = widths(bits)
    return dataclasses.replace(recipe, weight_format=f"int{weights}", activation_format=f"int{activations}", **changes)


def widths(bits: str) -> tuple[int, int]:
    """(4, 8) of "W4A8"."""
    weights, activations = bits[1:].split("A")
    return int(weights), int(activations)


def searched_probabilities(recipe: Recipe) -> Recipe:
    """Softmax's range from the calibrator, not fixed at 1."""
    return dataclasses.replace(recipe, rules=tuple(dataclasses.replace(rule, amax=None) for rule in recipe.rules))


def first_system(bits: str) -> Recipe:
    """Histogram calibration, percentile 99.99, residual quantizers on."""
    return searched_probabilities(recipe_at(RECIPES["full"], bits, calibrator="percentile:99.99"))


def faster_transformer(bits: str) -> Recipe:
    """Percentile 99.99, weights per tensor; softmax, LayerNorm and residual adds in float."""
    matmuls = tuple(Rule(f"attn.{name}", quantize=True) for name in "qkv")
    rules = (*RECIPES["gemm"].rules, *matmuls)
    return recipe_at(RECIPES["gemm"], bits, rules=rules, calibrator="percentile:99.99", per_channel=False)


def our_variants(bits: str) -> dict[str, tuple[Recipe, dict[str, Any]]]:
    """{name: (recipe, calibration settings)}, one piece more or other at a time."""
    gemm, full = recipe_at(RECIPES["gemm"], bits), recipe_at(RECIPES["full"], bits)
    free = searched_probabilities(full)
    best = dataclasses.replace(free, weight_calibrator="mse")
    return {
        "gemm": (gemm, {}),
        "gemm, mse weights": (dataclasses.replace(gemm, weight_calibrator="mse"), {}),
        "full": (full, {}),
        "full, searched probs": (free, {}),
        "full, searched probs, mse weights": (best, {}),
        "full, searched probs, mse weights, chosen": (best, {"choose_calibrators": True}),
        "full, searched probs, mse weights, biases corrected": (best, {"correct_biases": True}),
        "full, searched probs, mse weights, reconstructed": (best, RECONSTRUCTION),
        "full, searched probs, mse weights, chosen, reconstructed": (
            best,
            {"choose_calibrators": True, **RECONSTRUCTION},
        ),
        "gemm, mse weights, reconstructed": (dataclasses.replace(gemm, weight_calibrator="mse"), RECONSTRUCTION),
        "first system": (first_system(bits), {}),
        "FasterTransformer": (faster_transformer(bits), {}),
    }


def modelopt_config(published: dict[str, Any], bits: str) -> dict[str, Any]:
    """One of ModelOpt's INT8 configurations with other widths."""
    weights, activations = widths(bits)
    config = json.loads(json.dumps(published))
    for entry in entries(config["quant_cfg"]):
        if entry.get("num_bits") == 8:
            entry["num_bits"] = weights if "axis" in entry and entry["axis"] == 0 else activations
    return config


def entries(value: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries in a nested structure."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from entries(inner)


class Bench:
    """The float model, the images, and the rows that come of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = [f"data.root={args.data}", f"model.checkpoint={args.checkpoint}", "run=unused"]
        config = load_config(args.config, settings)
        self.name, task = config.model.name, family_of(config.model.name).task
        self.model, preprocessing = build_float_model(config.model, config.data.preprocessing)
        self.model.to(args.device)
        training = scan_folder(task, args.data / "train")
        self.description = Description(model_arguments(config.model), "float", preprocessing, training.classes)
        drawn = draw_samples(training, args.images, args.seed)
        calibrated = set(drawn)
        others = [sample for sample in training.samples if sample not in calibrated]
        samples = others if args.choosing else scan_folder(task, args.data / "val").samples
        self.batches = list(image_batches(samples[:: args.every], preprocessing, 64, args.workers))
        self.calibration = [batch.images for batch in image_batches(drawn, preprocessing, 32, args.workers)]
        self.tensors = [torch.from_numpy(images).to(args.device) for images in self.calibration]
        predict = TorchPredictor(self.model, self.description, args.device)
        self.reference = [predict(batch.images) for batch in self.batches]
        self.rows = json.loads(args.out.read_text()) if args.out.is_file() else []

    def measure(
        self,
        toolkit: str,
        recipe: str,
        bits: str,
        make: Callable[[], Callable[[np.ndarray], np.ndarray]],
        device: str | None = None,
    ) -> None:
        """Adds a row, unless it is there or not asked for. `make` builds the model and returns its predictor."""
        key = {
            "model": self.name,
            "toolkit": toolkit,
            "recipe": recipe,
            "bits": bits,
            "stage": "ptq",
            "seed": self.args.seed,
        }
        known = any(all(row[name] == value for name, value in key.items()) for row in self.rows)
        if known or not re.search(self.args.only, f"{toolkit} {recipe} {bits}"):
            return
        torch.manual_seed(self.args.seed)
        start = time.perf_counter()
        predict = make()
        seconds = time.perf_counter() - start
        metric = main_metric(self.description.task, self.description.classes or ())
        result = evaluate(predict, self.batches, [metric, Divergence(self.reference)])
        measured = {name: round(result[name], 5) for name in (*metric.headline, "kl")}
        where = {
            "images": result["images"],
            "device": device_name(device or self.args.device),
            "commit": self.args.commit,
        }
        self.rows.append({**key, **measured, "seconds": round(seconds, 1), **where})
        figures = " ".join(f"{value:8.5g}" for value in measured.values())
        print(f"{bits} {toolkit:<12} {recipe:<56} {figures} {seconds:7.1f} s", flush=True)
        write_rows(self.args.out, self.rows)

    def predictor(self, model: nn.Module) -> TorchPredictor:
        return TorchPredictor(model, self.description, self.args.device)

    def ours(self, bits: str) -> None:
        for name, (recipe, settings) in our_variants(bits).items():

            def make(recipe: Recipe = recipe, settings: dict[str, Any] = settings) -> TorchPredictor:
                twin = quantize(self.model, recipe)
                calibrate(twin, self.tensors, CalibrationConfig(**settings), None)
                return self.predictor(twin)

            self.measure("qswin", name, bits, make)

    def modelopt(self, bits: str) -> None:
        """Its INT8 configurations, with other bit widths put in; it quantizes the weighted layers."""
        import modelopt.torch.quantization as mtq

        from benchmarks.modelopt import histogram_calibration

        default = mtq.INT8_DEFAULT_CFG
        configs = {"max": default, "smoothquant": mtq.INT8_SMOOTHQUANT_CFG, "mse": default}
        configs |= {"entropy": default, "percentile 99.99": default}
        for name, published in configs.items():

            def make(name: str = name, published: dict = published) -> TorchPredictor:
                config = modelopt_config(published, bits)
                if name == "entropy":
                    return self.predictor(histogram_calibration(self.model, self.tensors, config, "entropy"))
                if name.startswith("percentile"):
                    settings = {"percentile": float(name.split()[1])}
                    return self.predictor(
                        histogram_calibration(self.model, self.tensors, config, "percentile", **settings)
                    )
                if name == "mse":
                    config["algorithm"] = "mse"

                def forward(model: nn.Module) -> None:
                    with torch.inference_mode():
                        for images in self.tensors:
                            model(images)

                return self.predictor(mtq.quantize(copy.deepcopy(self.model), config, forward))

            self.measure("modelopt", name, bits, make)

    def onnxruntime(self) -> None:
        """Its static quantization: QDQ, weights per channel, symmetric as TensorRT needs it."""
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        from qswin.trt.graphs.files import properties, read_onnx

        class Reader:
            """Batches, a stride at a time where the option CalibStridedMinMax (for every method) asks for it."""

            def __init__(self, batches: list[np.ndarray]) -> None:
                self.batches, self.feeds = batches, iter(batches)

            def __len__(self) -> int:
                return len(self.batches)

            def set_range(self, start_index: int, end_index: int) -> None:
                self.feeds = iter(self.batches[start_index:end_index])

            def get_next(self) -> dict[str, np.ndarray] | None:
                images = next(self.feeds, None)
                return None if images is None else {"input": images}

        images = np.concatenate(self.calibration)[:ONNX_RUNTIME_IMAGES]
        batches = [images[i : i + 8] for i in range(0, len(images), 8)]
        for method in CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile:

            def make(method: CalibrationMethod = method) -> Callable[[np.ndarray], np.ndarray]:
                import onnxruntime

                with tempfile.TemporaryDirectory() as folder:
                    path, ready, out = (Path(folder) / name for name in ("fp32.onnx", "ready.onnx", "int8.onnx"))
                    save_onnx(path, export_onnx(self.model, self.description, "fp32"), self.description.to_dict())
                    assert properties(read_onnx(path))
                    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
                    options = {
                        "ActivationSymmetric": True,
                        "WeightSymmetric": True,
                        "CalibStridedMinMax": ONNX_RUNTIME_STRIDE,
                    }
                    quantize_static(
                        str(ready),
                        str(out),
                        Reader(batches),
                        per_channel=True,
                        activation_type=QuantType.QInt8,
                        weight_type=QuantType.QInt8,
                        calibrate_method=method,
                        extra_options=options,
                    )
                    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
                return lambda images: session.run(["logits"], {"input": images})[0]

            self.measure("onnxruntime", f"{method.name.lower()}, {len(images)} images", "W8A8", make, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default="configs/swin_tiny_tinyimagenet.yaml")
    parser.add_argument("--bits", nargs="*", default=["W8A8", "W6A6", "W4A4"])
    parser.add_argument("--toolkits", nargs="*", default=["qswin", "modelopt", "onnxruntime"])
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
    bench.measure("torch", "float", "W32A32", lambda: bench.predictor(bench.model))
    for bits in args.bits:
        if "qswin" in args.toolkits:
            bench.ours(bits)
        if "modelopt" in args.toolkits:
            bench.modelopt(bits)
    if "onnxruntime" in args.toolkits:
        bench.onnxruntime()


if __name__ == "__main__":
    main()
