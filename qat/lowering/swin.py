"""Lowered blocks and patch mergings of Swin V1 and V2: seven to nine kernels a block; the residual stream is float."""

import torch
from torch import Tensor, nn

from qswin.qat.lowering.layers import LoweredLinear, LoweredNorm, channel_scale_of
from qswin.qat.lowering.transformer import LoweredAttention, LoweredCosineAttention, LoweredTransformerBlock
from qswin.qat.quant.twins.swin import (
    QuantPatchMerging,
    QuantPatchMergingV2,
    QuantSwinBlock,
    QuantSwinV2Block,
    _merge_2x2,
)


class LoweredBlock(LoweredTransformerBlock):
    """A Swin V1 block. x: (B, H, W, C)."""

    attention_type = LoweredAttention

    def __init__(self, block: QuantSwinBlock, site: str, height: int, width: int) -> None:
        attn, bias = block.attn, block.attn._bias(block.mask(height, width))
        attention = self.attention_type(attn, f"{site}.attn", attn.relative_position_index.shape[0], bias)
        super().__init__(block, site, attention, window_token_ids(block, height, width), height * width)


class LoweredBlockV2(LoweredBlock):
    """A Swin V2 block: norms come after attention and MLP; q and k are normalized to length 1."""

    attention_type = LoweredCosineAttention

    def residuals(self, x: Tensor) -> Tensor:
        """Both branches. x: (B, L, C)."""
        attended = self.attention(self.norm1.gather_quantize(x, self.attention.qkv))
        x = self.norm1.add(self.proj.dequantize(attended, x.dtype), x)
        h = self.fc1.gelu_requantize(self.norm2.gather_quantize(x, self.fc1), self.fc2.inv_scale)
        return self.norm2.add(self.fc2.dequantize(h, x.dtype), x)

    def fold_channel_scales(self, block: QuantSwinBlock) -> None:
        """Folds nothing: no norm comes before qkv and fc1, and `gather_quantize` takes their channel scales."""


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
