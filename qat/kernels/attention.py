"""INT8 window attention: both matmuls, position bias, mask and softmax of a few windows and a head in one program."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import to_int8, to_int8_reference

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-24)  # of a squared length: F.normalize's 1e-12, squared
WINDOWS_PER_PROGRAM = 4  # so that a program reads their bias once
SMALL_GRID = 2048  # programs, below which each takes one window


@triton.jit
def _attend(q, k, v, bias, qk_scale, probs_inv_scale, av_scale):
    """int8 result (N, D) of a window in a head; q, k, v: (N, D) int8; bias (N, N) times LOG2E, as softmax uses exp2."""
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * (qk_scale * LOG2E) + bias
    probs = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    q_probs = to_int8(probs * (probs_inv_scale / tl.sum(probs, axis=1))[:, None])
    return to_int8(tl.dot(q_probs, v, out_dtype=tl.int32).to(tl.float32) * av_scale)


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
    WINDOWS_PER_PROGRAM: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """A few windows that share a mask, in one head."""
    mask_id, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    offs_t, offs_d = tl.arange(0, BLOCK_TOKENS), tl.arange(0, HEAD_DIM)
    token_mask = (offs_t < NUM_TOKENS)[:, None]
    bias_ptr += (mask_id * num_heads + head) * BLOCK_TOKENS * BLOCK_TOKENS
    bias = tl.load(bias_ptr + offs_t[:, None] * BLOCK_TOKENS + offs_t[None, :]).to(tl.float32) * LOG2E
    qk_scale = tl.load(qk_scale_ptr + head)
    probs_inv_scale, av_scale = tl.cast(probs_inv_scale, tl.float32), tl.cast(av_scale, tl.float32)
    head_offsets = offs_t[:, None] * CHANNELS + head * HEAD_DIM + offs_d[None, :]
    for step in range(WINDOWS_PER_PROGRAM):
        window = (tl.program_id(1) * WINDOWS_PER_PROGRAM + step) * num_masks + mask_id
        if window < num_windows:
            window_offset = window.to(tl.int64) * NUM_TOKENS * CHANNELS
            qkv_ptrs = qkv_ptr + 3 * window_offset + head_offsets + offs_t[:, None] * (2 * CHANNELS)
            q = tl.load(qkv_ptrs, mask=token_mask, other=0)
            k = tl.load(qkv_ptrs + CHANNELS, mask=token_mask, other=0)
            v = tl.load(qkv_ptrs + 2 * CHANNELS, mask=token_mask, other=0)
            if COSINE:
                q = to_int8(_l2_normalize(q) * tl.cast(q_inv_scale, tl.float32))
                k = to_int8(_l2_normalize(k) * tl.cast(k_inv_scale, tl.float32))
                v = to_int8(v.to(tl.float32) * tl.cast(v_inv_scale, tl.float32))
            out = _attend(q, k, v, bias, qk_scale, probs_inv_scale, av_scale)
            tl.store(out_ptr + window_offset + head_offsets, out, mask=token_mask)


def _launch(qkv: Tensor, bias: Tensor, num_tokens: int, qk_scale: Tensor, cosine: bool, *scales: float) -> Tensor:
    num_masks, num_heads, block_tokens, _ = bias.shape
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=torch.int8, device=qkv.device)
    num_windows = rows // num_tokens
    windows_per_program = 1 if statically_known_true(num_windows * num_heads < SMALL_GRID) else WINDOWS_PER_PROGRAM
    grid = (num_masks * num_heads, triton.cdiv(num_windows, num_masks * windows_per_program))
    wrap_triton(_window_attention_kernel)[grid](
        qkv, bias, qk_scale, out, num_windows, num_masks, num_heads, *scales,
        NUM_TOKENS=num_tokens, CHANNELS=channels, HEAD_DIM=channels // num_heads, BLOCK_TOKENS=block_tokens,
        WINDOWS_PER_PROGRAM=windows_per_program, COSINE=cosine, num_warps=4,
    )  # fmt: skip
    return out


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(
    qkv: Tensor, bias: Tensor, num_tokens: int, qk_scale: Tensor, probs_inv_scale: float, av_scale: float
) -> Tensor:
    """int8(int8(softmax(q k^T * qk_scale + bias) * probs_inv_scale) v * av_scale).

    Args:
        qkv: (W * N, 3 * heads * D) int8: W windows of N tokens; q, k and v side by side, heads within each.
        bias: (M, heads, P, P), float16 or float32, as `padded_bias` returns it: position bias plus mask; window w has
            mask w % M.
        num_tokens: N.
        qk_scale: (heads,) float32: the scale of q times that of k.
        probs_inv_scale: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.

    Returns:
        (W * N, heads * D) int8.
    """
    return _launch(qkv, bias, num_tokens, qk_scale, False, 1.0, 1.0, 1.0, probs_inv_scale, av_scale)


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
) -> Tensor:
    """`window_attention` of int8(q / ||q|| * q_inv_scale), int8(k / ||k|| * k_inv_scale) and int8(v * v_inv_scale).

    qkv is float16 or float32, and qk_scale the scale of q times that of k times the head's logit scale.
    """
    return _launch(
        qkv, bias, num_tokens, qk_scale, True, q_inv_scale, k_inv_scale, v_inv_scale, probs_inv_scale, av_scale
    )


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
    qkv: Tensor, bias: Tensor, num_tokens: int, qk_scale: Tensor, probs_inv_scale: float, av_scale: float
) -> Tensor:
    """`window_attention` in plain torch: the integer sums are exact in float64."""
    q, k, v = _split_heads(qkv, num_tokens, bias.shape[1])
    return _attention_reference(q, k, v, bias, qk_scale, probs_inv_scale, av_scale)


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
) -> Tensor:
    """`cosine_window_attention` in plain torch."""
    q, k, v = _split_heads(qkv.float(), num_tokens, bias.shape[1])
    q = to_int8_reference(F.normalize(q, dim=-1) * q_inv_scale)
    k, v = to_int8_reference(F.normalize(k, dim=-1) * k_inv_scale), to_int8_reference(v * v_inv_scale)
    return _attention_reference(q, k, v, bias, qk_scale, probs_inv_scale, av_scale)


def _split_heads(qkv: Tensor, num_tokens: int, num_heads: int) -> Tensor:
    """(W * N, 3 * heads * D) -> (3, W, heads, N, D)."""
    return qkv.view(-1, num_tokens, 3, num_heads, qkv.shape[1] // 3 // num_heads).permute(2, 0, 3, 1, 4)


def _attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, qk_scale: Tensor, probs_inv_scale: float, av_scale: float
) -> Tensor:
    num_tokens = q.shape[2]
    bias = bias[:, :, :num_tokens, :num_tokens].float()
    scores = (q.double() @ k.double().transpose(-2, -1)).float() * qk_scale[:, None, None]
    probs = (scores.view(-1, *bias.shape) + bias).softmax(-1).view(scores.shape)
    values = (to_int8_reference(probs * probs_inv_scale).double() @ v.double()).float() * av_scale
    return to_int8_reference(values).transpose(1, 2).flatten(2).flatten(0, 1)
