"""Window attention in INT8 or FP8: matmuls, position bias, mask and softmax of a few windows and a head at once."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qswin.calib.grid import UINT8
from qswin.qat.kernels.arithmetic import to_levels, to_levels_reference
from qswin.qat.kernels.launch import Launch, plans

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-24)  # of a squared length: F.normalize's 1e-12, squared
WINDOWS_PER_PROGRAM = 4  # so that a program reads their bias once
SCALES = ("q_inv_scale", "k_inv_scale", "v_inv_scale", "probs_inv_scale", "av_scale")  # of the kernel, in order
SMALL_GRID = 2048  # programs, below which each takes one window


@triton.jit
def _attend(q, k, v, bias, qk_scale, probs_inv_scale, av_scale, UNSIGNED: tl.constexpr):
    """The result (N, D) of a window in a head, as levels; q, k, v: (N, D) levels; bias (N, N) times LOG2E, for exp2.

    UNSIGNED probabilities, of 0 to 255, are 128 less in int8, which is made good by the sum of v's columns.
    """
    SUM: tl.constexpr = tl.int32 if v.dtype == tl.int8 else tl.float32
    scores = tl.dot(q, tl.trans(k), out_dtype=SUM).to(tl.float32) * (qk_scale * LOG2E) + bias
    probs = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    probs *= (probs_inv_scale / tl.sum(probs, axis=1))[:, None]
    if UNSIGNED:
        sums = tl.dot(to_levels(probs - 128.0, v.dtype), v, out_dtype=SUM) + 128 * tl.sum(v.to(SUM), axis=0)[None, :]
    else:
        sums = tl.dot(to_levels(probs, v.dtype), v, out_dtype=SUM)
    return to_levels(sums.to(tl.float32) * av_scale, v.dtype)


@triton.jit
def _l2_normalize(x):
    """Rows of length 1; rows of zeros stay."""
    x = x.to(tl.float32)
    return x * tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), EPS))[:, None]


@triton.jit
def _window_attention_kernel(
    qkv_ptr, bias_ptr, qk_scale_ptr, out_ptr, num_windows, num_masks, num_heads,
    q_inv_scale, k_inv_scale, v_inv_scale, probs_inv_scale, av_scale,
    NUM_TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    WINDOWS_PER_PROGRAM: tl.constexpr, COSINE: tl.constexpr, UNSIGNED: tl.constexpr,
):  # fmt: skip
    """A few windows that share a mask, in one head."""
    mask_id, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    offs_t, offs_d = tl.arange(0, BLOCK_TOKENS), tl.arange(0, HEAD_DIM)
    token_mask = (offs_t < NUM_TOKENS)[:, None]
    bias_ptr += (mask_id * num_heads + head) * BLOCK_TOKENS * BLOCK_TOKENS
    bias = tl.load(bias_ptr + offs_t[:, None] * BLOCK_TOKENS + offs_t[None, :]).to(tl.float32) * LOG2E
    qk_scale = tl.load(qk_scale_ptr + head)
    probs_inv_scale, av_scale = tl.cast(probs_inv_scale, tl.float32), tl.cast(av_scale, tl.float32)
    LEVEL: tl.constexpr = out_ptr.dtype.element_ty
    head_offsets = offs_t[:, None] * CHANNELS + head * HEAD_DIM + offs_d[None, :]
    for step in range(WINDOWS_PER_PROGRAM):
        window = (tl.program_id(1) * WINDOWS_PER_PROGRAM + step) * num_masks + mask_id
        if window < num_windows:
            window_offset = window.to(tl.int64) * NUM_TOKENS * CHANNELS
            qkv_ptrs = qkv_ptr + 3 * window_offset + head_offsets + offs_t[:, None] * (2 * CHANNELS)
            q = tl.load(qkv_ptrs, mask=token_mask, other=0.0)
            k = tl.load(qkv_ptrs + CHANNELS, mask=token_mask, other=0.0)
            v = tl.load(qkv_ptrs + 2 * CHANNELS, mask=token_mask, other=0.0)
            if COSINE:
                q = to_levels(_l2_normalize(q) * tl.cast(q_inv_scale, tl.float32), LEVEL)
                k = to_levels(_l2_normalize(k) * tl.cast(k_inv_scale, tl.float32), LEVEL)
                v = to_levels(v.to(tl.float32) * tl.cast(v_inv_scale, tl.float32), LEVEL)
            out = _attend(q, k, v, bias, qk_scale, probs_inv_scale, av_scale, UNSIGNED)
            tl.store(out_ptr + window_offset + head_offsets, out, mask=token_mask)


def _plan(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    *scales: float,
    dtype: torch.dtype,
    cosine: bool,
    unsigned: bool,
) -> Launch:
    num_masks, num_heads, block_tokens, _ = bias.shape
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=dtype, device=qkv.device)
    num_windows = rows // num_tokens
    windows_per_program = 1 if statically_known_true(num_windows * num_heads < SMALL_GRID) else WINDOWS_PER_PROGRAM
    arguments: dict[str, Any] = {"qkv_ptr": qkv, "bias_ptr": bias, "qk_scale_ptr": qk_scale, "out_ptr": out}
    arguments |= {"num_windows": num_windows, "num_masks": num_masks, "num_heads": num_heads}
    arguments |= dict(zip(SCALES, scales, strict=True))
    arguments |= {"NUM_TOKENS": num_tokens, "CHANNELS": channels, "HEAD_DIM": channels // num_heads}
    arguments |= {"BLOCK_TOKENS": block_tokens, "WINDOWS_PER_PROGRAM": windows_per_program}
    arguments |= {"COSINE": cosine, "UNSIGNED": unsigned}
    grid = (num_masks * num_heads, triton.cdiv(num_windows, num_masks * windows_per_program))
    return Launch(_window_attention_kernel, grid, arguments, {"num_warps": 4}, out)


def _run(launch: Launch) -> Tensor:
    wrap_triton(_window_attention_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@plans("qswin::window_attention")
def _plan_attention(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Launch:
    scales = (1.0, 1.0, 1.0, probs_inv_scale, av_scale)
    return _plan(qkv, bias, num_tokens, qk_scale, *scales, dtype=qkv.dtype, cosine=False, unsigned=unsigned)


@plans("qswin::cosine_window_attention")
def _plan_cosine_attention(qkv: Tensor, bias: Tensor, num_tokens: int, qk_scale: Tensor, *rest: Any) -> Launch:
    *scales, dtype, unsigned = rest
    return _plan(qkv, bias, num_tokens, qk_scale, *scales, dtype=dtype, cosine=True, unsigned=unsigned)


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Tensor:
    """levels(levels(softmax(q k^T * qk_scale + bias) * probs_inv_scale) v * av_scale).

    Args:
        qkv: (W * N, 3 * heads * D) int8 or float8_e4m3fn: W windows of N tokens; q, k and v side by side, heads within
            each.
        bias: (M, heads, P, P), float16 or float32, as `padded_bias` returns it: position bias plus mask; window w has
            mask w % M.
        num_tokens: N.
        qk_scale: (heads,) float32: the scale of q times that of k.
        probs_inv_scale: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.
        unsigned: whether the probabilities' levels are 0 to 255 where the others are int8.

    Returns:
        (W * N, heads * D) of qkv's dtype.
    """
    return _run(_plan_attention(qkv, bias, num_tokens, qk_scale, probs_inv_scale, av_scale, unsigned))


@triton_op("qswin::cosine_window_attention", mutates_args={})
def cosine_window_attention(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    q_inv_scale: float,
    k_inv_scale: float,
    v_inv_scale: float,
    probs_inv_scale: float,
    av_scale: float,
    dtype: torch.dtype,
    unsigned: bool,
) -> Tensor:
    """`window_attention` of the levels of q / ||q|| * q_inv_scale, k / ||k|| * k_inv_scale and v * v_inv_scale.

    qkv is float16 or float32, and qk_scale the scale of q times that of k times the head's logit scale. dtype is that
    of the levels and of the result, int8 or float8_e4m3fn.
    """
    scales = (q_inv_scale, k_inv_scale, v_inv_scale, probs_inv_scale, av_scale)
    return _run(_plan_cosine_attention(qkv, bias, num_tokens, qk_scale, *scales, dtype, unsigned))


def padded_bias(bias: Tensor) -> Tensor:
    """Position bias plus mask (M, heads, N, N) as the kernels read it: float16, rows and columns up to a tile's size.

    Each row's largest value is taken off: softmax does not see it, and float16 has no digits to spare for the 16 that
    Swin V2's biases reach. No token attends to the new columns.
    """
    extra = max(32, triton.next_power_of_2(bias.shape[-1])) - bias.shape[-1]
    bias = bias - bias.amax(dim=-1, keepdim=True)
    return F.pad(F.pad(bias, (0, extra), value=-float("inf")), (0, 0, 0, extra)).half().contiguous()


@window_attention.register_kernel("cpu")
def window_attention_reference(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Tensor:
    """`window_attention` in plain torch: the sums are exact in float64."""
    q, k, v = _split_heads(qkv, num_tokens, bias.shape[1])
    return _attention_reference(q, k, v, bias, qk_scale, probs_inv_scale, av_scale, unsigned)


@cosine_window_attention.register_kernel("cpu")
def cosine_window_attention_reference(
    qkv: Tensor,
    bias: Tensor,
    num_tokens: int,
    qk_scale: Tensor,
    q_inv_scale: float,
    k_inv_scale: float,
    v_inv_scale: float,
    probs_inv_scale: float,
    av_scale: float,
    dtype: torch.dtype,
    unsigned: bool,
) -> Tensor:
    """`cosine_window_attention` in plain torch."""
    q, k, v = _split_heads(qkv.float(), num_tokens, bias.shape[1])
    q = to_levels_reference(F.normalize(q, dim=-1) * q_inv_scale, dtype)
    k = to_levels_reference(F.normalize(k, dim=-1) * k_inv_scale, dtype)
    v = to_levels_reference(v * v_inv_scale, dtype)
    return _attention_reference(q, k, v, bias, qk_scale, probs_inv_scale, av_scale, unsigned)


def _split_heads(qkv: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """(W * N, 3 * heads * D) -> (3, W, heads, N, D)."""
    return qkv.view(-1, num_tokens, 3, num_heads, qkv.shape[1] // 3 // num_heads).permute(2, 0, 3, 1, 4)


def _attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Tensor:
    num_tokens = q.shape[2]
    bias = bias[:, :, :num_tokens, :num_tokens].float()
    scores = (q.double() @ k.double().transpose(-2, -1)).float() * qk_scale[:, None, None]
    probs = (scores.view(-1, *bias.shape) + bias).softmax(-1).view(scores.shape) * probs_inv_scale
    q_probs = UINT8.nearest(probs) if unsigned else to_levels_reference(probs, v.dtype)
    values = (q_probs.double() @ v.double()).float() * av_scale
    return to_levels_reference(values, v.dtype).transpose(1, 2).flatten(2).flatten(0, 1)
