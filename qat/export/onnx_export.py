"""ONNX files through torch.export."""

import contextlib
import copy
import json
import logging as std_logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qswin.calib.files import write_atomic
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_passes import finish_weights, lower_to_opset_17
from qswin.qat.float_model import input_size
from qswin.qat.ptq.prediction import LOGITS, Outputs, named_outputs
from qswin.qat.quant.blocks import fix_size
from qswin.qat.quant.layers import undo_channel_scales
from qswin.qat.quant.quantizers import check_precision, own_precision, quantizers
from qswin.qat.quant.recipe import RECIPES
from qswin.qat.quant.rewrite import clip_weights, disable, enable, fold_biases, quantize
from qswin.qat.quant.twins.swin import QuantSwinBlock

QUANTIZED = ("int8", "fp8")
PRECISIONS = (*QUANTIZED, "fp32", "fp16")
OLDEST_OPSET = 17  # TensorRT 8.6's newest
SMALLEST_SIDE = 64  # of a graph for images of any size: two patches of the last stage
DEFAULT_OPSET = 20  # the first in which Gelu is one node


class _HalfPrecision(nn.Module):
    """Takes and gives float32 and computes in float16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: Tensor) -> Any:
        return tree_map(Tensor.float, self.model(x.half()))


def export_onnx(
    model: nn.Module,
    description: Description,
    precision: str | None = None,
    opset: int = DEFAULT_OPSET,
    batch: int | None = None,
    any_size: bool = False,
) -> ir.Model:
    """Exports a float or quantized model to an ONNX graph with input `input` (N, 3, H, W) and output `logits`.

    A backbone's graph has an output for each feature map instead, of its name.

    Each quantized site is exactly one QuantizeLinear and DequantizeLinear pair; weights are INT8 or FP8 initializers
    with a DequantizeLinear, or, at opset 17, which is for TensorRT 8.x, float32 initializers with a pair. A site with
    channel scales has one Mul before its pair. Position biases and shift masks are one constant a block.

    Args:
        model: is left as it is.
        precision: int8 and fp8 keep the quantizers; None is the one of the two that is the model's (`own_precision`).
            fp32 and fp16 export the same weights without them, and take channel scales back into the weights.
        opset: 17 or newer. The exporter writes 18 and newer; for 17 the reductions, which changed since, are rewritten.
        batch: a fixed batch size; None leaves it free.
        any_size: leaves height and width free, of a model that takes any; else they are those of the description's
            preprocessing. What depends on them is then computed by the graph.

    Raises:
        ValueError: int8 or fp8 of a model that is not quantized, not calibrated or of another format, or whose format
            the opset lacks (the site is named); a wrong precision or opset; or the description is not this model's.
    """
    precision = precision or own_precision(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; choose {', '.join(PRECISIONS)}")
    if opset < OLDEST_OPSET:
        raise ValueError(
            f"opset {opset} is too old: LayerNormalization and per-channel Q/DQ need {OLDEST_OPSET} or newer"
        )
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset {opset} is too new: the newest that the installed onnx knows is {newest}")
    twin = _prepare(model, description, precision, opset)
    outputs = check_fits(twin, description)
    example = torch.randn(batch or 2, 3, *description.preprocessing.size)
    if not any_size:
        fix_size(twin, example[:1])
    fold_biases(twin)
    free = {0: torch.export.Dim("batch", min=1)} if batch is None else {}
    free |= free_sides(twin, description.preprocessing.size) if any_size else {}
    traced = _HalfPrecision(twin) if precision == "fp16" else twin
    graph = _export(traced, example, max(opset, 18), free, list(outputs))
    if graph.opset_imports.get("") != max(opset, 18):
        written = graph.opset_imports.get("")
        raise ValueError(f"opset {opset} cannot be written, the exporter gives {written}; choose --opset {written}")
    finish_weights(graph, store=opset > OLDEST_OPSET)
    if opset == OLDEST_OPSET:
        lower_to_opset_17(graph)
    return graph


def _prepare(model: nn.Module, description: Description, precision: str, opset: int) -> nn.Module:
    """The twin to trace: a copy, in evaluation mode on the CPU, with everything constant folded into tensors."""
    twin = quantize(model, RECIPES["none"]) if description.recipe is None else copy.deepcopy(model)
    twin = twin.cpu().eval()
    if precision in QUANTIZED:
        if not any(quantizers(twin)):
            raise ValueError(
                "the checkpoint is not quantized: run qswin calibrate first, or export with --precision fp32"
            )
        check_precision(twin, precision, "the checkpoint is")
        check_formats(twin, opset)
        enable(twin)
        clip_weights(twin)
    else:
        disable(twin, quiet=True)
        undo_channel_scales(twin)
    return twin


def check_formats(model: nn.Module, opset: int) -> None:
    """Raises ValueError, naming the first site at fault, unless the opset has a type for every quantizer's format."""
    for quantizer in quantizers(model):
        grid = quantizer.spec.grid
        if grid.onnx_type is None or grid.torch_dtype is None:
            raise ValueError(
                f"{quantizer.site}: format {grid.name!r} has no type in ONNX; export with --precision fp32"
            )
        if opset < grid.opset:
            raise ValueError(
                f"{quantizer.site}: format {grid.name!r} needs opset {grid.opset} or newer, not {opset}; "
                "TensorRT 8.x, which reads opset 17, lacks it"
            )


def check_fits(model: nn.Module, description: Description) -> Outputs:
    """Runs a model once, on an image of the size that its description says.

    Args:
        model: float32, on the CPU, in evaluation mode.

    Returns:
        What it gives.

    Raises:
        ValueError: the model does not take such an image, or does not give as many classes as the description says.
    """
    height, width = description.preprocessing.size
    try:
        with torch.no_grad():
            outputs = named_outputs(model(torch.zeros(1, 3, height, width)))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = (
            f"the model does not take an image of 3 x {height} x {width}, the size of its description's preprocessing"
        )
        raise ValueError(f"{what}: {reason}") from error
    if LOGITS not in outputs:
        return outputs  # feature maps have no classes
    promised = {"model's num_classes": description.model.get("num_classes")}
    if description.classes is not None:
        promised["classes"] = len(description.classes)
    for name, count in promised.items():
        found = outputs[LOGITS].shape[1]
        if count and found != count:
            raise ValueError(f"the model gives {found} classes, but its description's {name} says {count}")
    return outputs


def free_sides(model: nn.Module, example: tuple[int, int]) -> dict[int, Any]:
    """The dimensions of height and width, left free.

    Args:
        example: the size of the image that is traced.

    Raises:
        ValueError: the model takes one size; or pads its windows before it shifts them, which torch.export cannot trace
            for any size; or the example is too small.
    """
    if (size := input_size(model)) is not None:
        takes = "the model takes images of {} x {} only".format(*size)
        raise ValueError(f"{takes}; a backbone (model.kwargs.out_features) takes any, or build the model for the size")
    padding = {module.windows.padding for module in model.modules() if isinstance(module, QuantSwinBlock)} - {"timm"}
    if padding:
        what = f"a graph for any size is not to be had of padding={min(padding)!r}"
        raise ValueError(f"{what}: export a graph for each size (--sizes 800x1344,1344x800)")
    if min(example) < SMALLEST_SIDE:
        raise ValueError(f"a graph for any size is traced with images of {SMALLEST_SIDE} pixels or more, not {example}")
    return {2: torch.export.Dim("height", min=SMALLEST_SIDE), 3: torch.export.Dim("width", min=SMALLEST_SIDE)}


def _export(model: nn.Module, example: Tensor, opset: int, free: dict[int, Any], names: list[str]) -> ir.Model:
    """Traces a model; `free` are the dimensions of its input that are not the example's."""
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # the exporter's deprecations, which a user cannot act on
        program: Any = torch.onnx.export(
            model,
            (example,),
            input_names=["input"],
            output_names=names,
            opset_version=opset,
            dynamic_shapes=(free or None,),
            dynamo=True,
            verbose=False,
        )
    return program.model


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silences what libraries log about their own passes."""
    levels = {name: std_logging.getLogger(name).level for name in loggers}
    for name in loggers:
        std_logging.getLogger(name).setLevel(std_logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            std_logging.getLogger(name).setLevel(level)


def save_onnx(path: Path, graph: ir.Model, metadata: dict[str, Any]) -> None:
    """Writes a graph with its metadata, atomically. Raises OSError when there is no room."""
    graph.producer_name = "qswin"
    graph.metadata_props["qswin"] = json.dumps(metadata)
    for node in graph.graph:
        node.metadata_props.clear()  # the exporter's stack traces, which name files of this machine
        node.doc_string = None
    write_atomic(path, ir.to_proto(graph).SerializeToString())
