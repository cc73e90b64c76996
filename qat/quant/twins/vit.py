"""Quantized twins of timm's ViT and DeiT modules (models/vit.py).

They take the float module's parameters, under the same state-dict names, and compute attention by matmuls that have
quantizers on their inputs, where timm may use a fused kernel.
"""

from typing import Any

from timm.models import vision_transformer as vit
from torch import Tensor, nn

from qswin.qat.quant.blocks import Fold, behind_norm, behind_values
from qswin.qat.quant.layers import MakeQuantizer, QuantAdd, QuantMatMul


class QuantAttention(nn.Module):
    """Global self-attention. x: (B, N, C), N tokens an image, the class token first where there is one."""

    def __init__(self, attn: vit.Attention, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        if getattr(attn, "gate", None) is not None:
            raise ValueError(f"{site}: gated attention has no quantized twin; choose a plain ViT")
        self.num_heads, self.scale = attn.num_heads, attn.scale
        self.qkv = attn.qkv
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.qk = QuantMatMul(f"{site}.q", f"{site}.k", quantizer)
        self.attn_drop = attn.attn_drop
        self.av = QuantMatMul(f"{site}.probs", f"{site}.v", quantizer)
        self.norm = attn.norm
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, N, C / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = self.qk(q * self.scale, k.transpose(-2, -1))
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = self.av(attn, v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(self.norm(x)))

    def folds(self) -> list[Fold]:
        """What takes factors of the projection's input over."""
        if not isinstance(self.norm, nn.Identity):
            return behind_norm(self.norm, self.proj)
        return behind_values(self.qkv, None if self.qkv.bias is None else self.qkv.bias.chunk(3)[2], self.proj)


class QuantViTBlock(nn.Module):
    """ViT block: norm, attention, residual; norm, MLP, residual; each branch with its layer scale. x: (B, N, C)."""

    def __init__(self, block: vit.Block, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn: Any = block.attn  # a twin by now
        self.ls1 = block.ls1
        self.drop_path1 = block.drop_path1
        self.add1 = QuantAdd(f"{site}.add1", quantizer)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = block.ls2
        self.drop_path2 = block.drop_path2
        self.add2 = QuantAdd(f"{site}.add2", quantizer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(x, self.drop_path1(self.ls1(self.attn(self.norm1(x)))))
        x = self.add2(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        return x

    def folds(self) -> list[Fold]:
        """What takes factors of qkv's and fc1's inputs over."""
        return behind_norm(self.norm1, self.attn.qkv) + behind_norm(self.norm2, self.mlp.fc1)


TWINS = {vit.Attention: QuantAttention, vit.Block: QuantViTBlock}
