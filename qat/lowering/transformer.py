"""What lowered transformer blocks share: attention up to its projection, and the two residual branches."""

import math
from typing import Any

import torch
from timm.layers.activations import GELU
from torch import Tensor, nn

from qswin.calib.grid import UINT8
from qswin.qat.kernels.attention import MAX_TOKENS, padded_bias, window_attention
from qswin.qat.lowering.layers import LoweredLinear, LoweredNorm, channel_scale_of, refuse_channel_scales, scale_of
from qswin.qat.quant.quantizers import TensorQuantizer


class LoweredAttention(nn.Module):
    """Attention of windows, or whole images, without its projection. (W * N, C) levels -> (W * N, C) levels.

    Args:
        attn: the twin: qkv, qk, av, proj, num_heads, and scale where q is multiplied by one.
        site: its name.
        tokens: N of a window.
        bias: (M, heads, N, N), position bias plus mask; window w has mask w % M. None where nothing is added.

    Raises:
        ValueError: a window has more than `MAX_TOKENS`, or see `scale_of` and `refuse_channel_scales`.
    """

    def __init__(self, attn: Any, site: str, tokens: int, bias: Tensor | None) -> None:
        super().__init__()
        if tokens > MAX_TOKENS:
            raise ValueError(f"{site} is over {tokens} tokens at once; its kernel takes at most {MAX_TOKENS}")
        self.tokens = tokens
        self.qkv = LoweredLinear(attn.qkv, f"{site}.qkv")
        quantizers = {"q": attn.qk._input_quantizer, "k": attn.qk._other_quantizer}
        quantizers |= {"probs": attn.av._input_quantizer, "v": attn.av._other_quantizer}
        self.scales = {name: float(scale_of(q, f"{site}.{name}")) for name, q in quantizers.items()}
        for name, quantizer in (*quantizers.items(), ("proj", attn.proj._input_quantizer)):
            refuse_channel_scales(quantizer, f"{site}.{name}")
        self.unsigned = quantizers["probs"].spec.grid.name == UINT8.name
        proj_scale = float(scale_of(attn.proj._input_quantizer, f"{site}.proj"))
        self.av_scale = self.scales["probs"] * self.scales["v"] / proj_scale
        self.register_buffer("qk_scale", self._fold_scales(attn))
        self.register_buffer("bias", None if bias is None else padded_bias(bias.detach()))
        self.qk_scale: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return window_attention(
            self._levels(x),
            self.bias,
            self.tokens,
            self.qk_scale,
            1 / self.scales["probs"],
            self.av_scale,
            self.unsigned,
        )

    def _levels(self, x: Tensor) -> Tensor:
        """q, k and v: (W * N, 3C)."""
        return self.qkv.requantize(x)

    def _fold_scales(self, attn: Any) -> Tensor:
        """Folds the scales of q, k and v into the qkv layer; returns each head's scale of the scores, (heads,)."""
        scales = self.qkv.scale.new_tensor([self.scales["q"] / attn.scale, self.scales["k"], self.scales["v"]])
        self.qkv.fold_output_scale(scales.repeat_interleave(len(self.qkv.weight) // 3))
        return self.qkv.scale.new_full((attn.num_heads,), self.scales["q"] * self.scales["k"])


class LoweredCosineAttention(LoweredAttention):
    """Attention of Swin V2: the heads of q and k are normalized to length 1 before they are quantized."""

    def _levels(self, x: Tensor) -> Tensor:
        head_dim = self.qkv.weight.shape[0] // 3 // self.qk_scale.shape[0]
        return self.qkv.cosine_requantize(x, self.inv_scale, head_dim)

    def _fold_scales(self, attn: Any) -> Tensor:
        """Adds the biases of q, k and v to the qkv layer, which multiplies by their inverse scales behind the norm."""
        if attn.q_bias is not None:
            self.qkv.bias += torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).detach()
        scales = self.qkv.scale.new_tensor([self.scales[name] for name in "qkv"])
        self.register_buffer("inv_scale", 1 / scales.repeat_interleave(len(self.qkv.weight) // 3))
        self.inv_scale: Tensor
        logit_scale = attn.logit_scale.detach().float().clamp(max=math.log(100.0)).exp().flatten()
        return logit_scale * (self.scales["q"] * self.scales["k"])


class LoweredTransformerBlock(nn.Module):
    """Norm, attention, residual; norm, MLP, residual. x: (B, L, C) or (B, H, W, C) float.

    Args:
        block: the twin: attn, norm1, norm2, mlp, add1, add2.
        site: its name.
        attention: what becomes of its attn.
        token_ids: (R, 1) of the rows that attention sees of an image; see `norm_quantize`.
        tokens: L.

    Raises:
        ValueError: the kernels cannot compute the block; the site is named.
    """

    def __init__(self, block: Any, site: str, attention: LoweredAttention, token_ids: Tensor, tokens: int) -> None:
        super().__init__()
        _check(block, site)
        self.attention = attention
        self.proj = LoweredLinear(block.attn.proj, f"{site}.attn.proj")
        self.fc1 = LoweredLinear(block.mlp.fc1, f"{site}.mlp.fc1")
        self.fc2 = LoweredLinear(block.mlp.fc2, f"{site}.mlp.fc2")
        self.norm1 = LoweredNorm(block.norm1, token_ids)
        self.norm2 = LoweredNorm(block.norm2, torch.arange(tokens)[:, None])
        self.fold_channel_scales(block)

    def forward(self, x: Tensor) -> Tensor:
        return self.residuals(x.flatten(1, -2)).view(x.shape)

    def residuals(self, x: Tensor) -> Tensor:
        """Both branches. x: (B, L, C)."""
        attended = self.attention(self.norm1.norm_quantize(x, self.attention.qkv))
        x = self.proj.add(attended, x, self.norm1.token_ids)
        h = self.fc1.gelu_requantize(self.norm2.norm_quantize(x, self.fc1), self.fc2.inv_scale)
        return self.fc2.add(h, x, self.norm2.token_ids)

    def fold_channel_scales(self, block: Any) -> None:
        """Folds the channel scales of qkv and fc1 into the norms before them."""
        self.norm1.fold_channel_scale(channel_scale_of(block.attn.qkv))
        self.norm2.fold_channel_scale(channel_scale_of(block.mlp.fc1))


def _check(block: Any, site: str) -> None:
    """Raises ValueError, which names the site, for what the kernels cannot compute."""
    for name, add in (("add1", block.add1), ("add2", block.add2)):
        if any(isinstance(q, TensorQuantizer) for q in (add._input_quantizer, add._other_quantizer)):
            raise ValueError(f"{site}.{name} is quantized; the kernels add in float: calibrate with recipe=attention")
    if not (isinstance(block.mlp.act, nn.GELU | GELU) and getattr(block.mlp.act, "approximate", "none") == "none"):
        raise ValueError(f"{site}.mlp: the kernels have exact GELU only, not {block.mlp.act}")
