"""Quantized twins of transformers' CvT modules (models/cvt.py).

Batch norms are folded into the convolutions before them when a model is rewritten, so that a weight is quantized as it
is used; their statistics are then fixed. In training, drop path drops a branch, as the original repository has it;
transformers drops the MLP's sum with its shortcut.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qswin.qat.quant.blocks import Fold, behind_norm
from qswin.qat.quant.layers import MakeQuantizer, QuantAdd, QuantConv2d, QuantMatMul


class QuantConvProjection(nn.Module):
    """Depthwise convolution of the tokens, its batch norm folded in. x: (B, C, H, W)."""

    def __init__(self, projection: Any, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.convolution: QuantConv2d = projection.convolution  # a twin by now
        norm = projection.normalization
        self.convolution.weight, self.convolution.bias = nn.utils.fuse_conv_bn_weights(
            self.convolution.weight,
            self.convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class QuantCvtAttention(nn.Module):
    """Self-attention over convolved tokens. x: (B, N, C), N = height * width, plus the class token if there is one."""

    def __init__(self, attn: Any, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.num_heads, self.scale, self.with_cls_token = attn.num_heads, attn.scale, attn.with_cls_token
        self.convolution_projection_query = attn.convolution_projection_query
        self.convolution_projection_key = attn.convolution_projection_key
        self.convolution_projection_value = attn.convolution_projection_value
        self.projection_query = attn.projection_query
        self.projection_key = attn.projection_key
        self.projection_value = attn.projection_value
        self.qk = QuantMatMul(f"{site}.q", f"{site}.k", quantizer)
        self.dropout = attn.dropout
        self.av = QuantMatMul(f"{site}.probs", f"{site}.v", quantizer)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        cls_token, x = x.split([1, height * width], dim=1) if self.with_cls_token else (x[:, :0], x)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        q = torch.cat((cls_token, self.convolution_projection_query(x)), dim=1)
        k = torch.cat((cls_token, self.convolution_projection_key(x)), dim=1)
        v = torch.cat((cls_token, self.convolution_projection_value(x)), dim=1)
        q = self._heads(self.projection_query(q))
        k = self._heads(self.projection_key(k))
        v = self._heads(self.projection_value(v))  # each (B, heads, tokens, C / heads)
        attn = self.qk(q * self.scale, k.transpose(-2, -1))
        attn = self.dropout(attn.softmax(dim=-1))
        return self.av(attn, v).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class QuantCvtLayer(nn.Module):
    """CvT layer: norm, attention, residual; norm, MLP, residual. x: (B, N, C)."""

    def __init__(self, layer: Any, site: str, quantizer: MakeQuantizer) -> None:
        super().__init__()
        self.layernorm_before = layer.layernorm_before
        self.attention = layer.attention
        self.add1 = QuantAdd(f"{site}.add1", quantizer)
        self.layernorm_after = layer.layernorm_after
        self.intermediate = layer.intermediate
        self.output = layer.output
        self.drop_path = layer.drop_path
        self.add2 = QuantAdd(f"{site}.add2", quantizer)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.add1(x, self.drop_path(self.attention(self.layernorm_before(x), height, width)))
        x = self.add2(x, self.drop_path(self._mlp(self.layernorm_after(x))))
        return x

    def folds(self) -> list[Fold]:
        """What takes factors of the MLP's input over."""
        return behind_norm(self.layernorm_after, self.intermediate.dense)

    def _mlp(self, x: Tensor) -> Tensor:
        """The output module without its own residual add."""
        return self.output.dropout(self.output.dense(self.intermediate(x)))


# By name: importing transformers takes seconds, which only those who use CvT should pay.
MODULE = "transformers.models.cvt.modeling_cvt"
TWINS = {
    f"{MODULE}.CvtSelfAttentionConvProjection": QuantConvProjection,
    f"{MODULE}.CvtSelfAttention": QuantCvtAttention,
    f"{MODULE}.CvtLayer": QuantCvtLayer,
}
