"""Window attention in INT8: both matmuls, position bias, mask and softmax of a few windows and a head in one program."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import reference_to_int8, to_int8

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-24)
WINDOWS = 4  # that a program takes, so that it reads their bias once
FEW = 2048  # programs, below which each takes one window


@triton.jit
def _attend(q, k, v, bias, qk_scale, probs_inverse, av_scale):
    """Levels of a window's result in one head; bias in powers of two, as softmax is computed here."""
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * (qk_scale * LOG2E) + bias
    probs = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    levels = to_int8(probs * (probs_inverse / tl.sum(probs, axis=1))[:, None])
    return to_int8(tl.dot(levels, v, out_dtype=tl.int32).to(tl.float32) * av_scale)


@triton.jit
def _unit(x):
    """Rows of length 1; zeros stay."""
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), TINY))[:, None]


@triton.jit
def _kernel(
    qkv_ptr, bias_ptr, qk_scale_ptr, out_ptr, windows, masks, heads,
    q_inverse, k_inverse, v_inverse, probs_inverse, av_scale,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WINDOWS: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Windows that share a mask, in one head."""
    place, head = tl.program_id(0) // heads, tl.program_id(0) % heads  # the window's place in its image
    token, depth = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    real = (token < TOKENS)[:, None]
    square = bias_ptr + (place * heads + head) * BLOCK * BLOCK + token[:, None] * BLOCK + token[None, :]
    bias = tl.load(square).to(tl.float32) * LOG2E
    qk_scale = tl.load(qk_scale_ptr + head)
    probs_inverse, av_scale = tl.cast(probs_inverse, tl.float32), tl.cast(av_scale, tl.float32)
    inside = token[:, None] * CHANNELS + head * HEAD + depth[None, :]
    for step in range(WINDOWS):
        window = (tl.program_id(1) * WINDOWS + step) * masks + place
        if window < windows:
            rows = window.to(tl.int64) * TOKENS * CHANNELS
            qkv = qkv_ptr + 3 * rows + inside + token[:, None] * (2 * CHANNELS)
            q = tl.load(qkv, mask=real, other=0)
            k = tl.load(qkv + CHANNELS, mask=real, other=0)
            v = tl.load(qkv + 2 * CHANNELS, mask=real, other=0)
            if COSINE:
                q, k = to_int8(_unit(q) * tl.cast(q_inverse, tl.float32)), to_int8(_unit(k) * tl.cast(k_inverse, tl.float32))
                v = to_int8(v.to(tl.float32) * tl.cast(v_inverse, tl.float32))
            tl.store(out_ptr + rows + inside, _attend(q, k, v, bias, qk_scale, probs_inverse, av_scale), mask=real)


def _attention(qkv: Tensor, bias: Tensor, tokens: int, qk_scale: Tensor, cosine: bool, *scales: float) -> Tensor:
    masks, heads, block, _ = bias.shape
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=torch.int8, device=qkv.device)
    windows = rows // tokens
    each = 1 if statically_known_true(windows * heads < FEW) else WINDOWS
    wrap_triton(_kernel)[(masks * heads, triton.cdiv(windows, masks * each))](
        qkv, bias, qk_scale, out, windows, masks, heads, *scales,
        TOKENS=tokens, CHANNELS=channels, HEAD=channels // heads, BLOCK=block, WINDOWS=each, COSINE=cosine, num_warps=4,
    )  # fmt: skip
    return out


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(
    qkv: Tensor, bias: Tensor, tokens: int, qk_scale: Tensor, probs_inverse: float, av_scale: float
) -> Tensor:
    """int8(int8(softmax(q k^T * qk_scale + bias) * probs_inverse) v * av_scale).

    Args:
        qkv: (W * N, 3 * heads * D) int8: q, k, v beside each other, heads within each, N tokens a window.
        bias: (M, heads, P, P), float16 or float32, as `padded_bias` gives it: position bias plus mask of window w in row
            w % M.
        tokens: N.
        qk_scale: (heads,) float32: the scale of q times that of k.
        probs_inverse: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.

    Returns:
        (W * N, heads * D) int8.
    """
    return _attention(qkv, bias, tokens, qk_scale, False, 1.0, 1.0, 1.0, probs_inverse, av_scale)


@triton_op("qswin::cosine_window_attention", mutates_args={})
def cosine_window_attention(
    qkv: Tensor,
    bias: Tensor,
    tokens: int,
    qk_scale: Tensor,
    q_inverse: float,
    k_inverse: float,
    v_inverse: float,
    probs_inverse: float,
    av_scale: float,
) -> Tensor:
    """`window_attention` of int8(q / ||q|| * q_inverse), int8(k / ||k|| * k_inverse) and int8(v * v_inverse).

    qkv is float16 or float32, and qk_scale the scale of q times that of k times the head's logit scale.
    """
    return _attention(qkv, bias, tokens, qk_scale, True, q_inverse, k_inverse, v_inverse, probs_inverse, av_scale)


def padded_bias(bias: Tensor) -> Tensor:
    """Position bias plus mask (M, heads, N, N) as the kernels read it: float16, with rows and columns up to a tile's size.

    Each row's largest value is taken off: softmax does not see it, and float16 has no digits to spare for the 16 that Swin
    V2's biases reach. No token attends to the new columns.
    """
    extra = max(32, triton.next_power_of_2(bias.shape[-1])) - bias.shape[-1]
    bias = bias - bias.amax(dim=-1, keepdim=True)
    return F.pad(F.pad(bias, (0, extra), value=-float("inf")), (0, 0, 0, extra)).half().contiguous()


@window_attention.register_kernel("cpu")
def reference(qkv: Tensor, bias: Tensor, tokens: int, qk_scale: Tensor, probs_inverse: float, av_scale: float) -> Tensor:
    """`window_attention` in plain torch: the integer sums are exact in float64."""
    q, k, v = _heads(qkv, tokens, bias.shape[1])
    return _reference(q, k, v, bias, qk_scale, probs_inverse, av_scale)


@cosine_window_attention.register_kernel("cpu")
def reference_cosine(
    qkv: Tensor,
    bias: Tensor,
    tokens: int,
    qk_scale: Tensor,
    q_inverse: float,
    k_inverse: float,
    v_inverse: float,
    probs_inverse: float,
    av_scale: float,
) -> Tensor:
    """`cosine_window_attention` in plain torch."""
    q, k, v = _heads(qkv.float(), tokens, bias.shape[1])
    q = reference_to_int8(F.normalize(q, dim=-1) * q_inverse)
    k, v = reference_to_int8(F.normalize(k, dim=-1) * k_inverse), reference_to_int8(v * v_inverse)
    return _reference(q, k, v, bias, qk_scale, probs_inverse, av_scale)


def _heads(qkv: Tensor, tokens: int, heads: int) -> Tensor:
    """(3, W, heads, N, D)."""
    return qkv.view(-1, tokens, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, qk_scale: Tensor, probs_inverse: float, av_scale: float
) -> Tensor:
    tokens = q.shape[2]
    bias = bias[:, :, :tokens, :tokens].float()
    scores = (q.double() @ k.double().transpose(-2, -1)).float() * qk_scale[:, None, None]
    probs = (scores.view(-1, *bias.shape) + bias).softmax(-1).view(scores.shape)
    values = (reference_to_int8(probs * probs_inverse).double() @ v.double()).float() * av_scale
    return reference_to_int8(values).transpose(1, 2).flatten(2).flatten(0, 1)
