"""Quantized twins of timm's Swin V1 and V2 modules (models/swin.py).

Each twin reads like the float forward with its quantizers visible in it. They take the float module's parameters, under
the same state-dict names, and differ from it in three ways only: the matmuls and residual adds are modules with
quantizers on their inputs; the position bias and the shift mask are one tensor, added once, and a constant after
`fold()`; padding that adds nothing is left out of the graph.
"""

import math
from typing import Any

import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from qswin.models.backbones.windows import PadsFirstBlock, PadsFirstV2Block, Windows, pad_to_multiple
from qswin.qat.quant.blocks import Fold, FoldingBlock, behind_norm, behind_values
from qswin.qat.quant.layers import MakeQuantizer, QuantAdd, QuantMatMul

TINY = 1e-6  # FP16 can express it


class QuantWindowAttention(nn.Module):
    """Window attention of Swin V1. x: (B * num_windows, N, C), N tokens a window."""

    def __init__(self, attn: v1.WindowAttention, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.num_heads, self.scale = attn.num_heads, attn.scale
        self.qkv = attn.qkv
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", attn.get_buffer("relative_position_index"), persistent=False)
        self.qk = QuantMatMul(f"{site}.q", f"{site}.k", quantizer)
        self.attn_drop = attn.attn_drop
        self.av = QuantMatMul(f"{site}.probs", f"{site}.v", quantizer)
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop
        self.folded_bias: Tensor | None
        self.register_buffer("folded_bias", None, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (windows, heads, N, C / heads)
        attn = self.qk(q * self.scale, k.transpose(-2, -1))
        attn = _add_bias(attn, self._bias(mask))
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = self.av(attn, v).transpose(1, 2).reshape(windows, tokens, -1)
        return self.proj_drop(self.proj(x))

    def folds(self) -> list[Fold]:
        """What takes factors of the projection's input over."""
        return behind_values(self.qkv, None if self.qkv.bias is None else self.qkv.bias.chunk(3)[2], self.proj)

    @torch.no_grad()
    def fold(self, mask: Tensor | None) -> None:
        """Computes bias and mask once, for inference: the graph then holds one constant."""
        self.folded_bias = self._bias(mask)

    def _bias(self, mask: Tensor | None) -> Tensor:
        """Position bias plus mask: (num_windows or 1, heads, N, N)."""
        bias = self._position_bias().unsqueeze(0) if self.folded_bias is None else self.folded_bias
        return bias if mask is None else bias + mask.unsqueeze(1)

    def _position_bias(self) -> Tensor:
        """(heads, N, N)."""
        index = self.relative_position_index
        return self.relative_position_bias_table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


class QuantWindowAttentionV2(nn.Module):
    """Cosine window attention of Swin V2: normalised q and k are quantized, their scale and the bias stay in float."""

    def __init__(self, attn: v2.WindowAttention, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.logit_scale = attn.logit_scale
        self.cpb_mlp = attn.cpb_mlp
        self.qkv = attn.qkv
        self.q_bias, self.v_bias = attn.q_bias, attn.v_bias
        self.k_bias: Tensor
        self.relative_coords_table: Tensor
        self.relative_position_index: Tensor
        for name in ("k_bias", "relative_coords_table", "relative_position_index"):
            self.register_buffer(name, attn.get_buffer(name), persistent=False)
        self.qk = QuantMatMul(f"{site}.q", f"{site}.k", quantizer)
        self.attn_drop = attn.attn_drop
        self.av = QuantMatMul(f"{site}.probs", f"{site}.v", quantizer)
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop
        self.folded_bias: Tensor | None
        self.register_buffer("folded_bias", None, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, tokens, _ = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = qkv.reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (windows, heads, N, C / heads)
        attn = self.qk(_normalize(q), _normalize(k).transpose(-2, -1))
        attn = attn * self.logit_scale.clamp(max=math.log(100.0)).exp()
        attn = _add_bias(attn, self._bias(mask))
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = self.av(attn, v).transpose(1, 2).reshape(windows, tokens, -1)
        return self.proj_drop(self.proj(x))

    def folds(self) -> list[Fold]:
        """What takes factors of the projection's input over."""
        return behind_values(self.qkv, self.v_bias, self.proj)

    @torch.no_grad()
    def fold(self, mask: Tensor | None) -> None:
        """Computes bias and mask once, for inference: the graph then holds one constant and no cpb_mlp."""
        self.folded_bias = self._bias(mask)

    def _bias(self, mask: Tensor | None) -> Tensor:
        """Continuous position bias plus mask: (num_windows or 1, heads, N, N)."""
        bias = self._position_bias().unsqueeze(0) if self.folded_bias is None else self.folded_bias
        return bias if mask is None else bias + mask.unsqueeze(1)

    def _position_bias(self) -> Tensor:
        """(heads, N, N)."""
        index = self.relative_position_index
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1))


def _normalize(x: Tensor) -> Tensor:
    """x / ||x|| over the last dimension, as F.normalize, in a way that FP16 can compute.

    The squares of a trained model's q and k overflow FP16 (they do above 255, and their sum sooner), and those of small
    ones vanish in it. Divided by its largest value first, a vector's sum of squares is from 1 to its length.
    """
    x = x / x.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
    return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp(min=TINY)


def _add_bias(attn: Tensor, bias: Tensor) -> Tensor:
    """attn: (B * num_windows, heads, N, N); bias: (num_windows or 1, heads, N, N)."""
    if len(bias) == 1:
        return attn + bias
    return (attn.view(-1, *bias.shape) + bias).view(attn.shape)


class QuantSwinBlock(FoldingBlock):
    """Swin V1 block: norm, attention, residual; norm, MLP, residual. x: (B, H, W, C)."""

    def __init__(self, block: v1.SwinTransformerBlock, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.windows = Windows.of(block)
        self.norm1 = block.norm1
        self.attn: Any = block.attn  # a twin by now
        self.drop_path1 = block.drop_path1
        self.add1 = QuantAdd(f"{site}.add1", quantizer)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.drop_path2 = block.drop_path2
        self.add2 = QuantAdd(f"{site}.add2", quantizer)
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", dict(block.named_buffers()).get("attn_mask"), persistent=False)
        self.any_size = block.dynamic_mask

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = self.add1(x, self.drop_path1(self._window_attention(self.norm1(x))))
        x = x.flatten(1, 2)  # else TensorRT multiplies B * H small matrices of W rows
        x = self.add2(x, self.drop_path2(self.mlp(self.norm2(x))))
        return x.reshape(size)

    def folds(self) -> list[Fold]:
        """What takes factors of qkv's and fc1's inputs over."""
        return behind_norm(self.norm1, self.attn.qkv) + behind_norm(self.norm2, self.mlp.fc1)

    def fold(self) -> None:
        """Folds what does not depend on the input; see QuantWindowAttention.fold. At any size the mask does."""
        self.attn.fold(self.attn_mask)
        self.attn_mask = None

    def fix_size(self, height: int, width: int) -> None:
        """Takes inputs of one size from now on, (B, height, width, C), whose mask is then a constant."""
        self.attn_mask, self.any_size = self.mask(height, width), False

    def mask(self, height: int, width: int) -> Tensor | None:
        """What is added to the scores for an input of this size, (num_windows, N, N); None where nothing is."""
        return self.windows.mask(height, width, self.attn.proj.weight.detach()) if self.any_size else self.attn_mask

    def _window_attention(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = self.attn(self.windows.cut(x), self.mask(height, width))
        return self.windows.join(x, height, width)


class QuantSwinV2Block(QuantSwinBlock):
    """Swin V2 block: like V1's, but the norms come after attention and MLP ("res-post-norm")."""

    def folds(self) -> list[Fold]:
        """None: qkv and fc1 read the residual stream."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = self.add1(x, self.drop_path1(self.norm1(self._window_attention(x))))
        x = x.flatten(1, 2)
        x = self.add2(x, self.drop_path2(self.norm2(self.mlp(x))))
        return x.reshape(size)


class QuantPatchMerging(nn.Module):
    """Patch merging of Swin V1: 2x2 neighbours to one token. (B, H, W, C) -> (B, H/2, W/2, out_dim)."""

    def __init__(self, merging: v1.PatchMerging | v2.PatchMerging, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.norm = merging.norm
        self.reduction = merging.reduction

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(_merge_2x2(x)))

    def folds(self) -> list[Fold]:
        """What takes factors of the reduction's input over."""
        return behind_norm(self.norm, self.reduction)


class QuantPatchMergingV2(QuantPatchMerging):
    """Patch merging of Swin V2: the norm comes after the reduction."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(_merge_2x2(x)))

    def folds(self) -> list[Fold]:
        """None: the reduction reads the residual stream."""
        return []


def _merge_2x2(x: Tensor) -> Tensor:
    x = pad_to_multiple(x, 2, 2)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)


TWINS = {
    v1.WindowAttention: QuantWindowAttention,
    v1.SwinTransformerBlock: QuantSwinBlock,
    v1.PatchMerging: QuantPatchMerging,
    v2.WindowAttention: QuantWindowAttentionV2,
    v2.SwinTransformerV2Block: QuantSwinV2Block,
    v2.PatchMerging: QuantPatchMergingV2,
    PadsFirstBlock: QuantSwinBlock,
    PadsFirstV2Block: QuantSwinV2Block,
}
