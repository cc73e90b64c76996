"""Lowered blocks and patch mergings of Swin V1 and V2: seven to nine kernels a block; the residual stream is float."""

import math
from typing import Any

import torch
from timm.layers.activations import GELU
from torch import Tensor, nn

from qswin.calib.grid import UINT8
from qswin.qat.kernels.attention import cosine_window_attention, padded_bias, window_attention
from qswin.qat.lowering.layers import LoweredLinear, LoweredNorm, channel_scale_of, refuse_channel_scales, scale_of
from qswin.qat.quant.quantizers import TensorQuantizer
from qswin.qat.quant.twins.swin import (
    QuantPatchMerging,
    QuantPatchMergingV2,
    QuantSwinBlock,
    QuantSwinV2Block,
    _merge_2x2,
)


class LoweredBlock(nn.Module):
    """A Swin V1 block. x: (B, H, W, C)."""

    def __init__(self, block: QuantSwinBlock, site: str, height: int, width: int) -> None:
        super().__init__()
        _check(block, site)
        attn = block.attn
        self.qkv, self.proj = LoweredLinear(attn.qkv, f"{site}.attn.qkv"), LoweredLinear(attn.proj, f"{site}.attn.proj")
        self.fc1, self.fc2 = (
            LoweredLinear(block.mlp.fc1, f"{site}.mlp.fc1"),
            LoweredLinear(block.mlp.fc2, f"{site}.mlp.fc2"),
        )
        self.norm1 = LoweredNorm(block.norm1, window_token_ids(block, height, width))
        self.norm2 = LoweredNorm(block.norm2, torch.arange(height * width)[:, None])
        quantizers = {"q": attn.qk._input_quantizer, "k": attn.qk._other_quantizer}
        quantizers |= {"probs": attn.av._input_quantizer, "v": attn.av._other_quantizer}
        self.scales = {name: float(scale_of(q, f"{site}.attn.{name}")) for name, q in quantizers.items()}
        for name, quantizer in (*quantizers.items(), ("proj", attn.proj._input_quantizer)):
            refuse_channel_scales(quantizer, f"{site}.attn.{name}")
        self.unsigned = quantizers["probs"].spec.grid.name == UINT8.name
        self._fold_channel_scales(block)
        self.register_buffer("qk_scale", self._fold_scales(attn))
        self.register_buffer("position_bias", padded_bias(attn._bias(block.mask(height, width)).detach()))
        self.tokens = attn.relative_position_index.shape[0]
        self.qk_scale: Tensor
        self.position_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.flatten(1, 2)
        x = self.proj.add(self._attention(self.norm1.norm_quantize(x, self.qkv), x.dtype), x, self.norm1.token_ids)
        h = self.fc1.gelu_requantize(self.norm2.norm_quantize(x, self.fc1), self.fc2.inv_scale)
        return self.fc2.add(h, x, self.norm2.token_ids).view(size)

    def _fold_channel_scales(self, block: QuantSwinBlock) -> None:
        """Folds the channel scales of qkv and fc1 into the norms before them."""
        self.norm1.fold_channel_scale(channel_scale_of(block.attn.qkv))
        self.norm2.fold_channel_scale(channel_scale_of(block.mlp.fc1))

    def _fold_scales(self, attn: Any) -> Tensor:
        """Folds the scales of q, k and v into the qkv layer; returns each head's scale of the scores, (heads,)."""
        scales = self.qkv.scale.new_tensor([self.scales["q"] / attn.scale, self.scales["k"], self.scales["v"]])
        self.qkv.fold_output_scale(scales.repeat_interleave(len(self.proj.weight)))
        return self.qkv.scale.new_full((attn.num_heads,), self.scales["q"] * self.scales["k"])

    def _attention(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The windows' tokens (B * R, C) -> the projection's input (B * R, C), both levels."""
        return window_attention(
            self.qkv.requantize(x), self.position_bias, self.tokens, self.qk_scale, *self._av_scales(), self.unsigned
        )

    def _av_scales(self) -> tuple[float, float]:
        """1 / the scale of the probabilities, and what the products with v are multiplied by."""
        return 1 / self.scales["probs"], self.scales["probs"] * self.scales["v"] / self.proj.input_scale


class LoweredBlockV2(LoweredBlock):
    """A Swin V2 block: norms come after attention and MLP; q and k are normalized to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.flatten(1, 2)
        h = self._attention(self.norm1.gather_quantize(x, self.qkv), x.dtype)
        x = self.norm1.add(self.proj.dequantize(h, x.dtype), x)
        h = self.fc1.gelu_requantize(self.norm2.gather_quantize(x, self.fc1), self.fc2.inv_scale)
        return self.norm2.add(self.fc2.dequantize(h, x.dtype), x).view(size)

    def _fold_channel_scales(self, block: QuantSwinBlock) -> None:
        """Folds nothing: no norm comes before qkv and fc1, and `gather_quantize` takes their channel scales."""

    def _fold_scales(self, attn: Any) -> Tensor:
        """Adds the biases of q, k and v to the qkv layer, which gives floats here; returns as in V1, (heads,)."""
        if attn.q_bias is not None:
            self.qkv.bias += torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).detach()
        logit_scale = attn.logit_scale.detach().float().clamp(max=math.log(100.0)).exp().flatten()
        return logit_scale * (self.scales["q"] * self.scales["k"])

    def _attention(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        inv_scales = (1 / self.scales[name] for name in "qkv")
        qkv = self.qkv.dequantize(x, dtype)
        return cosine_window_attention(
            qkv,
            self.position_bias,
            self.tokens,
            self.qk_scale,
            *inv_scales,
            *self._av_scales(),
            self.proj.weight.dtype,
            self.unsigned,
        )


class LoweredPatchMerging(nn.Module):
    """Patch merging of Swin V1. (B, H, W, C) -> (B, H/2, W/2, out_dim)."""

    def __init__(self, merging: QuantPatchMerging, site: str, height: int, width: int) -> None:
        super().__init__()
        self.reduction = LoweredLinear(merging.reduction, f"{site}.reduction")
        numbers = _merge_2x2(_token_numbers(height, width))
        self.size = numbers.shape[1:3]
        self.norm = LoweredNorm(merging.norm, numbers.flatten(0, 2).long() - 1)
        self._fold_channel_scale(merging)

    def _fold_channel_scale(self, merging: QuantPatchMerging) -> None:
        self.norm.fold_channel_scale(channel_scale_of(merging.reduction))

    def forward(self, x: Tensor) -> Tensor:
        q_x = self.norm.norm_quantize(x.flatten(1, 2), self.reduction)
        return self._to_image(self.reduction.dequantize(q_x, x.dtype), x.shape[0])

    def _to_image(self, y: Tensor, batch: int) -> Tensor:
        """(B * H/2 * W/2, out_dim) -> (B, H/2, W/2, out_dim)."""
        return y.view(batch, *self.size, -1)


class LoweredPatchMergingV2(LoweredPatchMerging):
    """Patch merging of Swin V2: the norm comes after the reduction."""

    def __init__(self, merging: QuantPatchMerging, site: str, height: int, width: int) -> None:
        super().__init__(merging, site, height, width)
        self.norm_after = merging.norm

    def _fold_channel_scale(self, merging: QuantPatchMerging) -> None:
        """Folds nothing: `gather_quantize` takes the channel scales."""

    def forward(self, x: Tensor) -> Tensor:
        q_x = self.norm.gather_quantize(x.flatten(1, 2), self.reduction)
        return self.norm_after(self._to_image(self.reduction.dequantize(q_x, x.dtype), x.shape[0]))


def _check(block: QuantSwinBlock, site: str) -> None:
    """Raises ValueError, which names the site, for what the kernels cannot compute."""
    for name, add in (("add1", block.add1), ("add2", block.add2)):
        if any(isinstance(q, TensorQuantizer) for q in (add._input_quantizer, add._other_quantizer)):
            raise ValueError(f"{site}.{name} is quantized; the kernels add in float: calibrate with recipe=attention")
    if not (isinstance(block.mlp.act, nn.GELU | GELU) and getattr(block.mlp.act, "approximate", "none") == "none"):
        raise ValueError(f"{site}.mlp: the kernels have exact GELU only, not {block.mlp.act}")


def _token_numbers(height: int, width: int) -> Tensor:
    """(1, H, W, 1): each token's number, from 1, so that the zeros that padding adds stand for no token."""
    return torch.arange(1, height * width + 1).float().view(1, height, width, 1)


def window_token_ids(block: QuantSwinBlock, height: int, width: int) -> Tensor:
    """(R, 1): the token ids of the block's windows, rolled and padded as the block does it; -1 for padding."""
    return block.windows.cut(_token_numbers(height, width)).flatten()[:, None].long() - 1


PARTS = {
    QuantSwinBlock: LoweredBlock,
    QuantSwinV2Block: LoweredBlockV2,
    QuantPatchMerging: LoweredPatchMerging,
    QuantPatchMergingV2: LoweredPatchMergingV2,
}
