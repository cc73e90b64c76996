"""Bit operations: multiply-adds times the bits of both factors, the cost that needs no measuring."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qswin.qat.quant.layers import QuantAdd, QuantConv2d, QuantLinear, QuantMatMul
from qswin.qat.quant.quantizers import TensorQuantizer

FLOAT_BITS = 16  # of a site that is not quantized


def bit_operations(model: nn.Module, image: Tensor) -> dict[str, tuple[float, float]]:
    """(quantized, in float) bit operations of each site for one image: multiply-adds times the bits of both factors.

    A matmul's are halved between its two inputs, and each element of a residual add's branch counts as one operation of
    its bits.

    Args:
        image: (1, 3, H, W).
    """
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for quantizer, operations, bits in _operations(layer, inputs, output):
            site = quantizer.recipe_site
            counts[site][0] += operations * bits
            counts[site][1] += operations * (FLOAT_BITS if isinstance(layer, QuantAdd) else FLOAT_BITS**2)

    kinds = (QuantLinear, QuantConv2d, QuantMatMul, QuantAdd)
    handles = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, kinds)]
    try:
        with torch.inference_mode():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return {site: (quantized, floating) for site, (quantized, floating) in counts.items()}


def _operations(
    layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> list[tuple[TensorQuantizer, float, int]]:
    """(quantizer, operations, bits of both factors) of each site of a layer."""
    first: Any = layer._input_quantizer
    second: Any = layer._weight_quantizer if isinstance(layer, QuantLinear | QuantConv2d) else layer._other_quantizer
    both = [q for q in (first, second) if isinstance(q, TensorQuantizer)]
    bits = [q.spec.grid.bits if isinstance(q, TensorQuantizer) else FLOAT_BITS for q in (first, second)]
    if isinstance(layer, QuantAdd):
        return [(q, float(output.numel()), q.spec.grid.bits) for q in both]
    if isinstance(layer, QuantMatMul):
        return [(q, output.numel() * inputs[0].shape[-1] / 2, bits[0] * bits[1]) for q in both]
    weight: Any = layer.weight
    return [(q, output.numel() * weight[0].numel(), bits[0] * bits[1]) for q in both[:1]]
