"""Blocks and patch mergings of Swin V1 and V2 on integers: seven to nine kernels a block, the residual stream in float."""

import math
from typing import Any

import torch
from timm.layers.activations import GELU
from torch import Tensor, nn

from qswin.qat.kernels.attention import cosine_window_attention, padded_bias, window_attention
from qswin.qat.lowering.layers import Int8Linear, Int8Norm, scale_of
from qswin.qat.quant.quantizers import TensorQuantizer
from qswin.qat.quant.twins.swin import (
    QuantPatchMerging,
    QuantPatchMergingV2,
    QuantSwinBlock,
    QuantSwinV2Block,
    _merge_2x2,
)


class Int8Block(nn.Module):
    """A Swin V1 block. x: (B, H, W, C)."""

    def __init__(self, block: QuantSwinBlock, site: str, height: int, width: int) -> None:
        super().__init__()
        _check(block, site)
        attn = block.attn
        self.qkv, self.proj = Int8Linear(attn.qkv, f"{site}.attn.qkv"), Int8Linear(attn.proj, f"{site}.attn.proj")
        self.fc1, self.fc2 = Int8Linear(block.mlp.fc1, f"{site}.mlp.fc1"), Int8Linear(block.mlp.fc2, f"{site}.mlp.fc2")
        self.norm1 = Int8Norm(block.norm1, window_index(block, height, width))
        self.norm2 = Int8Norm(block.norm2, torch.arange(height * width)[:, None])
        quantizers = {"q": attn.qk._input_quantizer, "k": attn.qk._other_quantizer}
        quantizers |= {"probs": attn.av._input_quantizer, "v": attn.av._other_quantizer}
        self.scales = {name: float(scale_of(each, f"{site}.attn.{name}")) for name, each in quantizers.items()}
        self.register_buffer("qk_scale", self._prepare(attn))
        self.register_buffer("position_bias", padded_bias(attn._bias(block.attn_mask).detach()))
        self.tokens = attn.relative_position_index.shape[0]
        self.qk_scale: Tensor
        self.position_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.flatten(1, 2)
        x = self.proj.add(self._attention(self.norm1.quantize(x, self.qkv.input_scale), x.dtype), x, self.norm1.index)
        h = self.fc1.gelu_quantize(self.norm2.quantize(x, self.fc1.input_scale), self.fc2.input_scale)
        return self.fc2.add(h, x, self.norm2.index).view(size)

    def _prepare(self, attn: Any) -> Tensor:
        """What the scores of each head are to be multiplied by, (heads,)."""
        scales = self.qkv.scale.new_tensor([self.scales["q"] / attn.scale, self.scales["k"], self.scales["v"]])
        self.qkv.give_levels(scales.repeat_interleave(len(self.proj.weight)))
        return self.qkv.scale.new_full((attn.num_heads,), self.scales["q"] * self.scales["k"])

    def _attention(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels of the windows' tokens (B * R, C) -> those of the projection's input."""
        return window_attention(self.qkv.quantize(x), self.position_bias, self.tokens, self.qk_scale, *self._av_scales())

    def _av_scales(self) -> tuple[float, float]:
        """1 / the scale of the probabilities; what products with v are multiplied by."""
        return 1 / self.scales["probs"], self.scales["probs"] * self.scales["v"] / self.proj.input_scale


class Int8BlockV2(Int8Block):
    """A Swin V2 block: the norms come after attention and MLP, and attention is that of q and k of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.flatten(1, 2)
        h = self._attention(self.norm1.quantize_input(x, self.qkv.input_scale), x.dtype)
        x = self.norm1.add(self.proj.to_float(h, x.dtype), x)
        h = self.fc1.gelu_quantize(self.norm2.quantize_input(x, self.fc1.input_scale), self.fc2.input_scale)
        return self.norm2.add(self.fc2.to_float(h, x.dtype), x).view(size)

    def _prepare(self, attn: Any) -> Tensor:
        if attn.q_bias is not None:
            self.qkv.bias += torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).detach()
        logit_scale = attn.logit_scale.detach().float().clamp(max=math.log(100.0)).exp().flatten()
        return logit_scale * (self.scales["q"] * self.scales["k"])

    def _attention(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        inverses = (1 / self.scales[name] for name in "qkv")
        qkv = self.qkv.to_float(x, dtype)
        return cosine_window_attention(qkv, self.position_bias, self.tokens, self.qk_scale, *inverses, *self._av_scales())


class Int8PatchMerging(nn.Module):
    """Patch merging of Swin V1. (B, H, W, C) -> (B, H/2, W/2, out_dim)."""

    def __init__(self, merging: QuantPatchMerging, site: str, height: int, width: int) -> None:
        super().__init__()
        self.reduction = Int8Linear(merging.reduction, f"{site}.reduction")
        places = _merge_2x2(_places(height, width))
        self.size = places.shape[1:3]
        self.norm = Int8Norm(merging.norm, places.flatten(0, 2).long() - 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = self.norm.quantize(x.flatten(1, 2), self.reduction.input_scale)
        return self._rows(self.reduction.to_float(levels, x.dtype), x.shape[0])

    def _rows(self, y: Tensor, batch: int) -> Tensor:
        return y.view(batch, *self.size, -1)


class Int8PatchMergingV2(Int8PatchMerging):
    """Patch merging of Swin V2: the norm, a plain one, comes after the reduction."""

    def __init__(self, merging: QuantPatchMerging, site: str, height: int, width: int) -> None:
        super().__init__(merging, site, height, width)
        self.norm_after = merging.norm

    def forward(self, x: Tensor) -> Tensor:
        levels = self.norm.quantize_input(x.flatten(1, 2), self.reduction.input_scale)
        return self.norm_after(self._rows(self.reduction.to_float(levels, x.dtype), x.shape[0]))


def _check(block: QuantSwinBlock, site: str) -> None:
    """Raises ValueError, naming the site, for what the kernels cannot compute."""
    for name, add in (("add1", block.add1), ("add2", block.add2)):
        if any(isinstance(q, TensorQuantizer) for q in (add._input_quantizer, add._other_quantizer)):
            raise ValueError(f"{site}.{name} is quantized; the kernels add in float: calibrate with recipe=attention")
    if not (isinstance(block.mlp.act, nn.GELU | GELU) and getattr(block.mlp.act, "approximate", "none") == "none"):
        raise ValueError(f"{site}.mlp: the INT8 kernels have exact GELU only, not {block.mlp.act}")


def _places(height: int, width: int) -> Tensor:
    """(1, H, W, 1): each token's number from 1; the zeros that padding adds are then no token's."""
    return torch.arange(1, height * width + 1).float().view(1, height, width, 1)


def window_index(block: QuantSwinBlock, height: int, width: int) -> Tensor:
    """(R, 1): the token of each place in the block's windows, rolled and padded as the block does it; -1 where none is."""
    return block.to_windows(_places(height, width)).flatten()[:, None].long() - 1


PARTS = {
    QuantSwinBlock: Int8Block,
    QuantSwinV2Block: Int8BlockV2,
    QuantPatchMerging: Int8PatchMerging,
    QuantPatchMergingV2: Int8PatchMergingV2,
}
