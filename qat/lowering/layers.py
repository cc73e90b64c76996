"""Lowered layers, in INT8 or FP8: linear, LayerNorm, patch embedding, head. Each is built from its calibrated twin."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qswin.qat.kernels.arithmetic import to_levels_reference
from qswin.qat.kernels.layer_norm import norm
from qswin.qat.kernels.linear import (
    linear_add,
    linear_cosine_quantize,
    linear_float,
    linear_gelu_quantize,
    linear_quantize,
)
from qswin.qat.kernels.norm_add import norm_add
from qswin.qat.kernels.norm_quantize import gather_quantize, norm_quantize
from qswin.qat.kernels.patch_embed import patch_embed
from qswin.qat.kernels.pool_quantize import pool_quantize
from qswin.qat.quant.quantizers import TensorQuantizer


def scale_of(quantizer: Any, site: str) -> Tensor:
    """A site's scale. Raises ValueError unless it is quantized and calibrated."""
    if not isinstance(quantizer, TensorQuantizer):
        raise ValueError(f"{site} is in float; the kernels need it quantized: calibrate with recipe=attention")
    quantizer.check_range()
    return quantizer.scale.detach()


def refuse_channel_scales(quantizer: TensorQuantizer, site: str) -> None:
    """Raises ValueError, naming the site, where a quantizer scales its input's channels, for kernels that do not."""
    if quantizer._pre_quant_scale is not None:
        raise ValueError(
            f"{site} scales its input's channels, which its kernel cannot do: "
            "calibrate without channel scales there, or fold them into the layer before"
        )


def channel_scale_of(layer: Any) -> Tensor:
    """What a QuantLinear multiplies its input's channels by before it quantizes them, (K,) float32; 1 where nothing."""
    scale = layer._input_quantizer._pre_quant_scale
    ones = torch.ones(layer.in_features, device=layer.weight.device)
    return ones if scale is None else ones * scale.detach().to(ones)


class LoweredWeight(nn.Module):
    """The weight, scale and bias of a QuantLinear or QuantConv2d, apart from channel scales of its input.

    `weight` holds levels, int8 or float8_e4m3fn. `scale` (N,) is the input's scale times each output channel's weight
    scale: what the sums of levels are multiplied by.
    """

    def __init__(self, layer: Any, site: str) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        self.input_scale = float(scale_of(layer._input_quantizer, site))
        scale = scale_of(layer._weight_quantizer, site).to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
        refuse_channel_scales(layer._weight_quantizer, f"{site}.weight")
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone()
        grid = layer._weight_quantizer.spec.grid
        self.register_buffer("weight", grid.nearest(weight / scale).to(getattr(torch, grid.torch_dtype)))
        self.register_buffer("scale", (scale.flatten() * self.input_scale).expand(len(weight)).contiguous())
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor


class LoweredLinear(LoweredWeight):
    """A linear layer. x: (M, K) levels in units of `input_scale`; a method for each of the kernels' epilogues.

    `inv_scale` (K,) is what each channel of a float input is multiplied by before it is rounded to such an x.
    """

    def __init__(self, layer: Any, site: str) -> None:
        super().__init__(layer, site)
        self.register_buffer("inv_scale", channel_scale_of(layer) / self.input_scale)
        self.inv_scale: Tensor

    def fold_output_scale(self, output_scale: Tensor) -> None:
        """Divides scale and bias by each output channel's scale, (N,), so `requantize` gives levels in units of it."""
        self.scale /= output_scale
        self.bias /= output_scale

    def multiply_output(self, factors: Tensor) -> None:
        """Multiplies scale and bias by each output channel's factor, (N,)."""
        self.scale *= factors
        self.bias *= factors

    def requantize(self, x: Tensor) -> Tensor:
        """(M, N) levels, in units of the scale given to `fold_output_scale`."""
        return linear_quantize(x, self.weight, self.scale, self.bias)

    def gelu_requantize(self, x: Tensor, inv_scale: Tensor) -> Tensor:
        """(M, N) levels: the result of GELU times inv_scale, (N,), the next layer's."""
        return linear_gelu_quantize(x, self.weight, self.scale, self.bias, inv_scale)

    def cosine_requantize(self, x: Tensor, inv_scale: Tensor, head_dim: int) -> Tensor:
        """(M, N) levels: q and k with heads of length 1, and v, times inv_scale, (N,); see `linear_cosine_quantize`."""
        return linear_cosine_quantize(x, self.weight, self.scale, self.bias, inv_scale, head_dim)

    def dequantize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, N) of a float dtype."""
        return linear_float(x, self.weight, self.scale, self.bias, dtype)

    def add(self, x: Tensor, shortcut: Tensor, token_ids: Tensor) -> Tensor:
        """shortcut (B, L, N) plus the result, each row being added to its token; see `linear_add`."""
        return linear_add(x, self.weight, self.scale, self.bias, shortcut, token_ids.flatten())


class LoweredNorm(nn.Module):
    """A LayerNorm, and the tokens that its rows are read from or added to: token_ids (R, T); see `norm_quantize`."""

    def __init__(self, norm: Any, token_ids: Tensor) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())
        self.register_buffer("token_ids", token_ids.to(norm.weight.device, torch.int32))
        self.weight: Tensor
        self.bias: Tensor
        self.token_ids: Tensor

    def fold_channel_scale(self, channel_scale: Tensor) -> None:
        """Multiplies the result by what the next layer's input channels are to be multiplied by, (T * C,)."""
        self.weight = self.weight * channel_scale
        self.bias = self.bias * channel_scale

    def norm_quantize(self, x: Tensor, reader: LoweredLinear) -> Tensor:
        """(B, L, C) float -> (B * R, T * C) levels for the layer that reads them."""
        inv_scale, dtype = 1 / reader.input_scale, reader.weight.dtype
        return norm_quantize(x, self.token_ids, self.weight, self.bias, self.eps, inv_scale, dtype)

    def gather_quantize(self, x: Tensor, reader: LoweredLinear) -> Tensor:
        """(B, L, C) float -> (B * R, T * C) levels of x itself for the layer that reads them.

        There is no norm: Swin V2 normalizes behind attention and MLP.
        """
        return gather_quantize(x, self.token_ids, reader.inv_scale, reader.weight.dtype)

    def add(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """shortcut (B, L, C) plus the norm of y (B * R, C), each row being added to its token."""
        return norm_add(y, shortcut, self.token_ids.flatten(), self.weight, self.bias, self.eps)


class LoweredLayerNorm(nn.Module):
    """A LayerNorm that no kernel of its neighbours takes in. Its parameters are those of the float one."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, self.eps)


class LoweredPatchEmbed(LoweredWeight):
    """timm's PatchEmbed with its norm. (B, 3, H, W) of any float dtype -> (B, H / patch, W / patch, C) of `dtype`."""

    def __init__(self, embed: Any, site: str, dtype: torch.dtype) -> None:
        super().__init__(embed.proj, f"{site}.proj")
        self.dtype = dtype
        refuse_channel_scales(embed.proj._input_quantizer, f"{site}.proj")
        self.patch_size, self.pads, self.eps = embed.patch_size, embed.dynamic_img_pad, embed.norm.eps
        self.register_buffer("norm_weight", embed.norm.weight.detach().float())
        self.register_buffer("norm_bias", embed.norm.bias.detach().float())
        self.norm_weight: Tensor
        self.norm_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.weight, self.scale, self.bias, self.norm_weight, self.norm_bias)
        x = whole_patches(x, self.patch_size, self.pads)
        grid = [side // patch for side, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        return patch_embed(x, *weights, 1 / self.input_scale, self.eps, self.dtype).view(x.shape[0], *grid, -1)


class LoweredPatchProjection(LoweredWeight):
    """timm's PatchEmbed without a norm. (B, 3, H, W) of any float dtype -> (B, L, C) of `dtype`.

    Raises:
        ValueError: its patches do not become a row of tokens.
    """

    def __init__(self, embed: Any, site: str, dtype: torch.dtype) -> None:
        super().__init__(embed.proj, f"{site}.proj")
        if not embed.flatten:
            raise ValueError(f"{site}: the kernels make a row of tokens of an image: build the model for one size")
        refuse_channel_scales(embed.proj._input_quantizer, f"{site}.proj")
        self.dtype, self.patch_size, self.pads = dtype, embed.patch_size, embed.dynamic_img_pad
        self.weight = self.weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), batch = self.patch_size, x.shape[0]
        x = whole_patches(x, self.patch_size, self.pads).float() / self.input_scale
        levels = to_levels_reference(x, self.weight.dtype)
        patches = levels.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, H / P, P, W / P, P)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        y = linear_float(rows, self.weight, self.scale, self.bias, self.dtype)
        return y.view(batch, -1, self.weight.shape[0])


def whole_patches(x: Tensor, patch_size: tuple[int, int], pads: bool) -> Tensor:
    """The image without the rows and columns that make no patch, or, where `pads`, with zeros behind them."""
    rest_h, rest_w = (side % patch for side, patch in zip(x.shape[2:], patch_size, strict=True))
    if not (rest_h or rest_w):
        return x
    if pads:
        return F.pad(x, (0, -x.shape[3] % patch_size[1], 0, -x.shape[2] % patch_size[0]))
    return x[:, :, : x.shape[2] - rest_h, : x.shape[3] - rest_w].contiguous()


class LoweredHead(LoweredLinear):
    """The classifier, with the average pooling before it. (B, H, W, C) or (B, C) float -> (B, classes) float32."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.contiguous().view(x.shape[0], -1, x.shape[-1])
        return self.dequantize(pool_quantize(tokens, self.inv_scale, self.weight.dtype), torch.float32)


class Float32Interface(nn.Module):
    """A model of another dtype with float32 images and logits, or feature maps, as engines have them.

    The model itself is not converted: its scales are float32, and FP16 could not hold them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dtype = model, next(model.parameters()).dtype

    def forward(self, x: Tensor) -> Any:
        return tree_map(Tensor.float, self.model(x.to(self.dtype)))
