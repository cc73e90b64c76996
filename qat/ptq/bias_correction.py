"""Bias correction: what quantization shifts the mean of a layer's output by is taken from its bias.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with the
means measured on calibration images, layer by layer, so that each sees the corrected ones before it.
"""

import copy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qswin.qat.quant.blocks import block_output
from qswin.qat.quant.layers import QuantConv2d, QuantLinear
from qswin.qat.quant.rewrite import disable


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Corrects the biases of a calibrated model's linears and convolutions, in place; a layer without bias keeps none.

    Args:
        batches: (N, 3, H, W) each, on the model's device.
    """
    teacher = copy.deepcopy(model).eval()
    disable(teacher, quiet=True)
    layers = [
        (ours, theirs) for ours, theirs in zip(model.modules(), teacher.modules(), strict=True) if _correctable(ours)
    ]
    for ours, theirs in tqdm(layers, "correct biases", disable=not sys.stderr.isatty()):
        shifts = [channel_means(theirs, teacher, batch) - channel_means(ours, model, batch) for batch in batches]
        ours.bias += torch.stack(shifts).mean(0)


def _correctable(layer: nn.Module) -> bool:
    return isinstance(layer, QuantLinear | QuantConv2d) and layer.bias is not None


def channel_means(layer: nn.Module, model: nn.Module, batch: Tensor) -> Tensor:
    """(C,) means of what a layer gives when the model sees a batch."""
    output = block_output(model, layer, batch)
    return output.mean((0, 2, 3)) if isinstance(layer, QuantConv2d) else output.flatten(0, -2).mean(0)
