"""Lowered blocks of ViT and DeiT: seven kernels a block, attention over the whole image."""

import torch
from torch import nn

from qswin.qat.lowering.layers import LoweredLinear
from qswin.qat.lowering.transformer import LoweredAttention, LoweredTransformerBlock
from qswin.qat.quant.twins.vit import QuantViTBlock


class LoweredViTBlock(LoweredTransformerBlock):
    """A ViT block; layer scales are folded into the linear layers before them. x: (B, N, C)."""

    def __init__(self, block: QuantViTBlock, site: str, tokens: int, channels: int) -> None:
        attn = block.attn
        for name in ("q_norm", "k_norm", "norm"):
            if not isinstance(getattr(attn, name), nn.Identity):
                raise ValueError(f"{site}.attn.{name}: the kernels have no norm there; build with another target")
        attention = LoweredAttention(attn, f"{site}.attn", tokens, bias=None)
        super().__init__(block, site, attention, torch.arange(tokens)[:, None], tokens)
        _fold_layer_scale(self.proj, block.ls1)
        _fold_layer_scale(self.fc2, block.ls2)


def _fold_layer_scale(linear: LoweredLinear, layer_scale: nn.Module) -> None:
    if not isinstance(layer_scale, nn.Identity):
        linear.multiply_output(layer_scale.get_parameter("gamma").detach())


PARTS = {QuantViTBlock: LoweredViTBlock}
