"""Latency of a model of which some sites stay in float, measured where it will run: exported, built and timed."""

import copy
import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from absl import logging
from torch import nn

from qswin.qat.backends.registry import OpenOptions, build, time_model
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import DEFAULT_OPSET, OLDEST_OPSET, export_onnx, save_onnx
from qswin.qat.quant.quantizers import own_precision, quantizers
from qswin.qat.quant.rewrite import leave_in_float
from qswin.trt.evaluation.timing import TimingOptions

RUNTIMES = ("onnxruntime", "tensorrt")
TIMING = TimingOptions(warmup=10, repeats=50, cpu_repeats=9)


def measure_latency(
    model: nn.Module, description: Description, floats: Collection[str], runtime: str, batch: int, timing_cache: Path
) -> float:
    """Median milliseconds of a batch: ONNX Runtime's on the CPU, or that of a TensorRT engine, the rest of it in FP16.

    Args:
        model: calibrated; it is left as it is.
        floats: the sites that stay in float.
        timing_cache: TensorRT's measured tactics, read and added to: the engines have most layers in common.

    Raises:
        ValueError: TensorRT is asked for and is not there.
    """
    mixed = without_quantizers(model, floats)
    precision = own_precision(mixed) if any(quantizers(mixed)) else "fp32"
    opset = OLDEST_OPSET if runtime == "tensorrt" else DEFAULT_OPSET
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixed.onnx"
        save_onnx(path, export_onnx(mixed, description, precision, opset, batch), description.to_dict())
        if runtime == "tensorrt":
            onnx, path = path, path.with_suffix(".engine")
            engine_precision = "fp16" if precision == "fp32" else precision
            sizes = (batch, batch, batch)
            given = {"onnx": onnx, "precision": engine_precision, "batch_sizes": sizes, "timing_cache": timing_cache}
            build("tensorrt", path, given)
        return next(time_model(path, [batch], OpenOptions(), TIMING))["ms"]


def without_quantizers(model: nn.Module, sites: Collection[str]) -> nn.Module:
    """A copy whose sites of these names are in float."""
    mixed = copy.deepcopy(model).cpu()
    leave_in_float(mixed, sites)
    return mixed


def latencies(
    model: nn.Module, description: Description, groups: list[list[str]], runtime: str, batch: int, timing_cache: Path
) -> Callable[[int], float]:
    """Milliseconds with the first n groups of sites in float, each n measured once."""

    @functools.cache
    def latency(count: int) -> float:
        floats = {site for group in groups[:count] for site in group}
        ms = measure_latency(model, description, floats, runtime, batch, timing_cache)
        logging.info("%d of %d groups in float: %.3f ms", count, len(groups), ms)
        return ms

    return latency
