"""Quantized layers: the float layer with quantizers on its inputs. They share the float layer's parameters."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qswin.qat.quant.quantizers import TensorQuantizer, quantizers

# What a recipe gives a layer for a site: a TensorQuantizer, or nn.Identity where the site stays in float.
MakeQuantizer = Callable[..., nn.Module]


class QuantLinear(nn.Module):
    """A linear layer whose input and weight are quantized. x: (..., in_features) -> (..., out_features)."""

    def __init__(self, linear: nn.Linear, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._input_quantizer = quantizer(site)
        self._weight_quantizer = quantizer(site, weight=self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class QuantConv2d(nn.Module):
    """A 2-D convolution whose input and weight are quantized. x: (N, C, H, W)."""

    def __init__(self, conv: nn.Conv2d, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(f"{site}: padding mode {conv.padding_mode!r} is not supported; only zeros is")
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self._input_quantizer = quantizer(site)
        self._weight_quantizer = quantizer(site, weight=self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._input_quantizer(x), self._weight_quantizer(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}"


class QuantMatMul(nn.Module):
    """A product of two activations, both quantized, each its own site."""

    def __init__(self, site: str, other_site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self._input_quantizer = quantizer(site)
        self._other_quantizer = quantizer(other_site)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.matmul(self._input_quantizer(x), self._other_quantizer(other))


class QuantAdd(nn.Module):
    """A residual add whose two branches are both quantized, each with its own range."""

    def __init__(self, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self._input_quantizer = quantizer(f"{site}.shortcut")
        self._other_quantizer = quantizer(f"{site}.branch")

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self._input_quantizer(x) + self._other_quantizer(other)


def weight_quantizers(model: nn.Module) -> list[tuple[TensorQuantizer, Tensor]]:
    """Every weight's quantizer with the weight it belongs to."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantConv2d)]
    pairs = [(layer._weight_quantizer, layer.weight) for layer in layers]
    return [(quantizer, weight) for quantizer, weight in pairs if isinstance(quantizer, TensorQuantizer)]


def channel_shape(layer: QuantLinear | QuantConv2d) -> tuple[int, ...]:
    """The shape of a factor for each input channel of a QuantLinear or QuantConv2d, to multiply its input by."""
    if isinstance(layer, QuantConv2d):
        return (layer.weight.shape[1] * layer.groups, 1, 1)
    return (layer.weight.shape[1],)


def scale_channels(layer: Any, weight: Tensor, factors: Tensor) -> Tensor:
    """A weight of a QuantLinear or QuantConv2d, each input channel multiplied by its factor (of `channel_shape`)."""
    groups = layer.groups if isinstance(layer, QuantConv2d) else 1
    by_group = weight.unflatten(0, (groups, -1)) * factors.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return by_group.flatten(0, 1)


@torch.no_grad()
def undo_channel_scales(model: nn.Module) -> None:
    """Multiplies each weight by its input's `_pre_quant_scale`, and drops that: the same function, in float.

    The ranges of the layers no longer fit; it is for a model whose quantizers are off.
    """
    for layer in model.modules():
        if not isinstance(layer, QuantLinear | QuantConv2d):
            continue
        quantizer = layer._input_quantizer
        if isinstance(quantizer, TensorQuantizer) and quantizer._pre_quant_scale is not None:
            layer.weight.data = scale_channels(layer, layer.weight.data, quantizer._pre_quant_scale)
            quantizer._pre_quant_scale = None


def check_channel_scales(model: nn.Module) -> None:
    """Raises ValueError, naming the site, where a `_pre_quant_scale` does not fit its layer or is not above 0."""
    layers = {m._input_quantizer: m for m in model.modules() if isinstance(m, QuantLinear | QuantConv2d)}
    for quantizer in quantizers(model):
        scale = quantizer._pre_quant_scale
        if scale is None:
            continue
        if quantizer not in layers or tuple(scale.shape) != channel_shape(layers[quantizer]):
            raise ValueError(f"{quantizer.site}: channel scales of shape {tuple(scale.shape)} do not fit its input")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"{quantizer.site}: a channel scale is not a positive number; calibrate again")
