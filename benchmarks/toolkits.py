"""Other toolkits' post-training quantization of a torch model: what benchmarks.accuracy compares ours with.

A function for each toolkit gives {row's name: what makes a predictor of the float model and the calibration images}.
A toolkit is imported when one of its rows is made, so that the others can be measured without it.
"""

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx

Predict = Callable[[Tensor], Tensor]  # (N, 3, H, W) -> logits
Make = Callable[[nn.Module, list[Tensor]], Predict]  # of a float model and calibration images; the model stays as it is

NNCF_IMAGES = 300  # its default for a calibration set
ONNX_RUNTIME_IMAGES = 128
ONNX_RUNTIME_STRIDE = 2  # batches of 8 at a time: it holds what every operator gives for all of them


def widths(bits: str) -> tuple[int, int]:
    """(4, 8) of "W4A8"."""
    weights, activations = bits[1:].split("A")
    return int(weights), int(activations)


def modelopt_rows(bits: str) -> dict[str, Make]:
    """Its INT8 configurations, with other widths put in, or its FP8 one; it quantizes the weighted layers."""
    if bits == "FP8":
        return {"max": functools.partial(_modelopt, bits=bits, published="FP8_DEFAULT_CFG", algorithm="max")}
    histograms: dict[str, dict[str, Any]] = {"entropy": {}, "percentile 99.99": {"percentile": 99.99}}
    configured = {
        "max": ("INT8_DEFAULT_CFG", "max"),
        "mse": ("INT8_DEFAULT_CFG", "mse"),
    }
    rows: dict[str, Make] = {
        name: functools.partial(_modelopt, bits=bits, published=published, algorithm=algorithm)
        for name, (published, algorithm) in configured.items()
    }
    rows["smoothquant"] = functools.partial(_modelopt_smoothquant, bits=bits)
    for name, settings in histograms.items():
        rows[name] = functools.partial(_modelopt_histograms, bits=bits, method=name.split()[0], settings=settings)
    return rows


def _modelopt(model: nn.Module, images: list[Tensor], bits: str, published: str, algorithm: str) -> nn.Module:
    import modelopt.torch.quantization as mtq

    config = {**modelopt_config(getattr(mtq, published), bits), "algorithm": algorithm}

    def forward(twin: nn.Module) -> None:
        with torch.inference_mode():
            for batch in images:
                twin(batch)

    return mtq.quantize(copy.deepcopy(model), config, forward)


def _modelopt_smoothquant(model: nn.Module, images: list[Tensor], bits: str) -> Predict:
    """Smoothed at 8 bits, which are all that it knows; neither its factors nor its ranges depend on the width.

    Given other widths it smooths nothing and leaves activations with a range for each channel.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    twin = _modelopt(model, images, "W8A8", "INT8_SMOOTHQUANT_CFG", "smoothquant")
    weights, activations = widths(bits)
    for name, module in twin.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            module.num_bits = weights if name.endswith("weight_quantizer") else activations
    return twin


def _modelopt_histograms(
    model: nn.Module, images: list[Tensor], bits: str, method: str, settings: dict[str, Any]
) -> Predict:
    import modelopt.torch.quantization as mtq

    from benchmarks.modelopt import histogram_calibration

    return histogram_calibration(model, images, modelopt_config(mtq.INT8_DEFAULT_CFG, bits), method, **settings)


def modelopt_config(published: dict[str, Any], bits: str) -> dict[str, Any]:
    """One of ModelOpt's configurations, with other widths where it is an integer one."""
    if bits == "FP8":
        return copy.deepcopy(published)
    weights, activations = widths(bits)
    config = json.loads(json.dumps(published))
    for entry in _entries(config["quant_cfg"]):
        if entry.get("num_bits") == 8:
            entry["num_bits"] = weights if "axis" in entry and entry["axis"] == 0 else activations
    return config


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries in a nested structure."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def nncf_rows(bits: str) -> dict[str, Make]:
    """Its quantization for transformers, 8 bits only, with fast bias correction.

    The preset "mixed" is its default: activations get a zero point where they are not symmetric. "performance" is
    symmetric, as TensorRT needs it.
    """
    if bits != "W8A8":
        return {}
    return {
        f"{preset}{', smoothquant' if smooth else ''}": functools.partial(_nncf, preset=preset, smooth=smooth)
        for preset in ("mixed", "performance")
        for smooth in (True, False)
    }


def _nncf(model: nn.Module, images: list[Tensor], preset: str, smooth: bool) -> Predict:
    """Calibrated on one image at a time, as its documentation advises for transformers."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    single = list(torch.cat(images)[:NNCF_IMAGES].split(1))
    alphas = AdvancedSmoothQuantParameters() if smooth else AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    return nncf.quantize(
        copy.deepcopy(model),
        nncf.Dataset(single),
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(single),
        fast_bias_correction=True,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
    ).eval()


def onnxruntime_rows(bits: str, description: Description) -> dict[str, Make]:
    """Its static quantization, 8 bits only: QDQ, weights per channel, symmetric as TensorRT needs it."""
    if bits != "W8A8":
        return {}
    return {
        f"{method.lower()}, {ONNX_RUNTIME_IMAGES} images": functools.partial(
            _onnxruntime, description=description, method=method
        )
        for method in ("MinMax", "Entropy", "Percentile")
    }


def _onnxruntime(model: nn.Module, images: list[Tensor], description: Description, method: str) -> Predict:
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = [batch.cpu().numpy() for batch in torch.cat(images)[:ONNX_RUNTIME_IMAGES].split(8)]
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "CalibStridedMinMax": ONNX_RUNTIME_STRIDE}
    with tempfile.TemporaryDirectory() as folder:
        path, ready, out = (Path(folder) / name for name in ("fp32.onnx", "ready.onnx", "int8.onnx"))
        proto = export_onnx(copy.deepcopy(model).cpu(), description, "fp32")
        save_onnx(path, proto, description.to_dict())
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(out),
            Batches(batches),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            extra_options=symmetric,
        )
        session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"input": images.cpu().numpy()})[0])


class Batches:
    """ONNX Runtime's calibration data, a stride at a time where CalibStridedMinMax (for every method) asks for it."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches, self.feeds = batches, iter(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.feeds = iter(self.batches[start_index:end_index])

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        images = next(self.feeds, None)
        return None if images is None else {"input": images}
