"""Layers on integers: linear, LayerNorm, patch embedding, head. Each is made of its calibrated twin."""

from typing import Any

import torch
from torch import Tensor, nn

from qswin.calib.grid import INT8
from qswin.qat.kernels.linear import linear_add, linear_float, linear_gelu_quantize, linear_quantize
from qswin.qat.kernels.norm_add import norm_add
from qswin.qat.kernels.norm_quantize import gather_quantize, norm_quantize
from qswin.qat.kernels.patch_embed import patch_embed
from qswin.qat.quant.quantizers import TensorQuantizer


def scale_of(quantizer: Any, site: str) -> Tensor:
    """A site's scale, amax / 127. Raises ValueError unless it is quantized to INT8 and calibrated."""
    if not isinstance(quantizer, TensorQuantizer) or quantizer.spec.grid.name != INT8.name:
        kind = quantizer.spec.grid.name if isinstance(quantizer, TensorQuantizer) else "float"
        raise ValueError(f"{site} is in {kind}; the INT8 kernels need it in int8: calibrate with recipe=attention")
    quantizer.check_range()
    return quantizer.scale.detach()


class Int8Weight(nn.Module):
    """A weight's integers, the scale of each channel's sums, and the bias. Made of a QuantLinear or QuantConv2d."""

    def __init__(self, layer: Any, site: str) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.input_scale = float(scale_of(layer._input_quantizer, site))
        scale = scale_of(layer._weight_quantizer, site).to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone()
        self.register_buffer("weight", (weight / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", (scale.flatten() * self.input_scale).expand(len(weight)).contiguous())
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor


class Int8Linear(Int8Weight):
    """A linear layer. x: (M, K) int8, levels of `input_scale`; its methods end in what comes next."""

    def give_levels(self, scales: Tensor) -> None:
        """Makes `quantize` give levels of these scales, one a column: they become part of its own."""
        self.scale /= scales
        self.bias /= scales

    def quantize(self, x: Tensor) -> Tensor:
        """(M, N) int8, levels of the scales that `give_levels` got."""
        return linear_quantize(x, self.weight, self.scale, self.bias)

    def gelu_quantize(self, x: Tensor, scale: float) -> Tensor:
        """(M, N) int8: GELU's result as levels of a scale."""
        return linear_gelu_quantize(x, self.weight, self.scale, self.bias, 1 / scale)

    def to_float(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, N) of a dtype."""
        return linear_float(x, self.weight, self.scale, self.bias, dtype)

    def add(self, x: Tensor, shortcut: Tensor, index: Tensor) -> Tensor:
        """shortcut (B, L, N) plus the result, whose rows belong where `index` says; see `linear_add`."""
        return linear_add(x, self.weight, self.scale, self.bias, shortcut, index.flatten())


class Int8Norm(nn.Module):
    """A LayerNorm, and the rows that it reads or writes: index (R, P); see `norm_quantize`."""

    def __init__(self, norm: Any, index: Tensor) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())
        self.register_buffer("index", index.to(norm.weight.device, torch.int32))
        self.weight: Tensor
        self.bias: Tensor
        self.index: Tensor

    def quantize(self, x: Tensor, scale: float) -> Tensor:
        """(B, L, C) float -> (B * R, P * C) int8, levels of a scale."""
        return norm_quantize(x, self.index, self.weight, self.bias, self.eps, 1 / scale)

    def quantize_input(self, x: Tensor, scale: float) -> Tensor:
        """The same of x itself."""
        return gather_quantize(x, self.index, 1 / scale)

    def add(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """shortcut (B, L, C) plus the norm of y (B * R, C), whose rows belong where the index says."""
        return norm_add(y, shortcut, self.index.flatten(), self.weight, self.bias, self.eps)


class Int8PatchEmbed(Int8Weight):
    """timm's PatchEmbed with its norm. (B, 3, H, W) -> (B, H / patch, W / patch, C)."""

    def __init__(self, embed: Any, site: str) -> None:
        super().__init__(embed.proj, f"{site}.proj")
        self.grid, self.eps = embed.grid_size, embed.norm.eps
        self.register_buffer("norm_weight", embed.norm.weight.detach().float())
        self.register_buffer("norm_bias", embed.norm.bias.detach().float())
        self.norm_weight: Tensor
        self.norm_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.weight, self.scale, self.bias, self.norm_weight, self.norm_bias)
        return patch_embed(x, *weights, 1 / self.input_scale, self.eps).view(x.shape[0], *self.grid, -1)


class Int8Head(Int8Linear):
    """The classifier. (B, C) float -> (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        levels = (x.float() / self.input_scale).round().clamp(-128, 127).to(torch.int8)
        return self.to_float(levels, x.dtype)


class Float32Interface(nn.Module):
    """Takes float32 images and gives float32 logits, as engines do, around a model whose parameters are of another dtype.

    The model is not converted: its scales are float32, and FP16 could not hold them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dtype = model, next(model.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype)).float()
