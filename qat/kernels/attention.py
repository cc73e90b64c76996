"""Attention in INT8 or FP8: matmuls, position bias, mask and softmax in one kernel."""

from typing import Any, NamedTuple

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
WINDOWS_PER_PROGRAM = 4  # of small windows, so that a program reads their bias once
SMALL_GRID = 2048  # programs, below which each takes one window
MAX_TOKENS = 1280  # of a window: the scores of 16 queries and all keys are held in registers
MIN_KEYS = 32  # the least that a product of 8-bit matrices sums over


@triton.jit
def _load_bias(bias_ptr, offs_q, offs_k, NUM_TOKENS: tl.constexpr, NUM_KEYS: tl.constexpr, BIAS: tl.constexpr):
    """What is added to scores: (queries, keys) float16, or (1, keys) without a bias; -inf for padding."""
    if BIAS:
        bias_ptrs = bias_ptr + offs_q[:, None] * NUM_KEYS + offs_k[None, :]
        bias = tl.load(bias_ptrs, mask=(offs_q < NUM_TOKENS)[:, None], other=0.0)
    else:
        bias = tl.where(offs_k < NUM_TOKENS, 0.0, -float("inf"))[None, :]
    return bias


@triton.jit
def _load_tokens(ptr, offs_t, offs_d, NUM_TOKENS: tl.constexpr, STRIDE: tl.constexpr):
    """q, k or v of some tokens, (tokens, D)."""
    return tl.load(ptr + offs_t[:, None] * STRIDE + offs_d[None, :], mask=(offs_t < NUM_TOKENS)[:, None], other=0.0)


@triton.jit
def _scores(q, k, bias, qk_scale):
    """The scores of q (Q, D) and k (K, D), for exp2: (Q, K) float32."""
    SUM: tl.constexpr = tl.int32 if q.dtype == tl.int8 else tl.float32
    return tl.dot(q, tl.trans(k), out_dtype=SUM).to(tl.float32) * (qk_scale * LOG2E) + bias.to(tl.float32)


@triton.jit
def _weighted_sums(probs, v, UNSIGNED: tl.constexpr):
    """The levels of probs (Q, K) times v (K, D).

    UNSIGNED probabilities, of 0 to 255, are 128 less in int8; the rest of the sums is a product too, for the matrix
    units have time to spare.
    """
    SUM: tl.constexpr = tl.int32 if v.dtype == tl.int8 else tl.float32
    if UNSIGNED:
        less = tl.full(probs.shape, -128, tl.int8)
        sums = tl.dot(to_levels(probs - 128.0, v.dtype), v, out_dtype=SUM) - tl.dot(less, v, out_dtype=SUM)
    else:
        sums = tl.dot(to_levels(probs, v.dtype), v, out_dtype=SUM)
    return sums


@triton.jit
def _attention_kernel(
    qkv_ptr, bias_ptr, qk_scale_ptr, out_ptr, num_windows, num_masks, num_heads, probs_inv_scale, av_scale,
    NUM_TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MORE_KEYS: tl.constexpr, WINDOWS_PER_PROGRAM: tl.constexpr,
    BIAS: tl.constexpr, UNSIGNED: tl.constexpr,
):  # fmt: skip
    """QUERIES tokens of a few windows that share a mask, in one head.

    All of a window's keys are seen at once, for a probability is rounded when the sum over its row is known. They are
    two tiles, of KEYS and MORE_KEYS, since a tile's size is a power of two: 144 tokens are 128 + 32, not 256.
    """
    NUM_TILES: tl.constexpr = (NUM_TOKENS + QUERIES - 1) // QUERIES
    tile, mask_head = tl.program_id(0) % NUM_TILES, tl.program_id(0) // NUM_TILES
    mask_id, head = mask_head // num_heads, mask_head % num_heads
    offs_d, offs_q = tl.arange(0, HEAD_DIM), tile * QUERIES + tl.arange(0, QUERIES)
    offs_k, offs_more = tl.arange(0, KEYS), KEYS + tl.arange(0, MORE_KEYS if MORE_KEYS else KEYS)
    bias_ptr += mask_head.to(tl.int64) * (NUM_TOKENS * (KEYS + MORE_KEYS))
    bias = _load_bias(bias_ptr, offs_q, offs_k, NUM_TOKENS, KEYS + MORE_KEYS, BIAS)
    if WINDOWS_PER_PROGRAM > 1:
        bias = bias.to(tl.float32)  # once; a single window's stays float16, in half the registers
    if MORE_KEYS:
        more_bias = _load_bias(bias_ptr, offs_q, offs_more, NUM_TOKENS, KEYS + MORE_KEYS, BIAS)
    qk_scale = tl.load(qk_scale_ptr + head)
    probs_inv_scale, av_scale = tl.cast(probs_inv_scale, tl.float32), tl.cast(av_scale, tl.float32)
    for step in range(WINDOWS_PER_PROGRAM):
        window = (tl.program_id(1) * WINDOWS_PER_PROGRAM + step) * num_masks + mask_id
        if window < num_windows:
            first = window.to(tl.int64) * (NUM_TOKENS * CHANNELS) + head * HEAD_DIM
            q_ptr = qkv_ptr + first + window.to(tl.int64) * (2 * NUM_TOKENS * CHANNELS)
            q = _load_tokens(q_ptr, offs_q, offs_d, NUM_TOKENS, 3 * CHANNELS)
            k = _load_tokens(q_ptr + CHANNELS, offs_k, offs_d, NUM_TOKENS, 3 * CHANNELS)
            v = _load_tokens(q_ptr + 2 * CHANNELS, offs_k, offs_d, NUM_TOKENS, 3 * CHANNELS)
            probs = _scores(q, k, bias, qk_scale)
            largest = tl.max(probs, axis=1)
            if MORE_KEYS:
                more_k = _load_tokens(q_ptr + CHANNELS, offs_more, offs_d, NUM_TOKENS, 3 * CHANNELS)
                more_v = _load_tokens(q_ptr + 2 * CHANNELS, offs_more, offs_d, NUM_TOKENS, 3 * CHANNELS)
                more_probs = _scores(q, more_k, more_bias, qk_scale)
                largest = tl.maximum(largest, tl.max(more_probs, axis=1))
                more_probs = tl.exp2(more_probs - largest[:, None])
            probs = tl.exp2(probs - largest[:, None])
            total = tl.sum(probs, axis=1)
            if MORE_KEYS:
                total += tl.sum(more_probs, axis=1)
            to_unit = (probs_inv_scale / total)[:, None]
            sums = _weighted_sums(probs * to_unit, v, UNSIGNED)
            if MORE_KEYS:
                sums += _weighted_sums(more_probs * to_unit, more_v, UNSIGNED)
            out = to_levels(sums.to(tl.float32) * av_scale, out_ptr.dtype.element_ty)
            out_ptrs = out_ptr + first + offs_q[:, None] * CHANNELS + offs_d[None, :]
            tl.store(out_ptrs, out, mask=(offs_q < NUM_TOKENS)[:, None])


class Tiles(NamedTuple):
    """What a program takes at once of a window: queries, and all keys in one tile or two."""

    queries: int
    keys: int
    more_keys: int

    @property
    def all_keys(self) -> int:
        """The tokens of a window, padded."""
        return self.keys + self.more_keys


def tiles(num_tokens: int, biased: bool = True) -> Tiles:
    """The tiles of windows of a number of tokens, from a sweep on an H200 (docs/performance.md).

    Scores, and a bias beside them, are held in the registers of four warps: of fewer queries where there are more keys.
    """
    keys, more_keys = max(MIN_KEYS, triton.next_power_of_2(num_tokens)), 0
    if num_tokens <= 64:
        return Tiles(keys, keys, 0)
    if num_tokens <= keys * 3 // 4:
        keys //= 2
        more_keys = max(MIN_KEYS, triton.next_power_of_2(num_tokens - keys))
    queries = 64 if keys + more_keys <= 256 else 32 if keys + more_keys <= (512 if biased else 640) else 16
    return Tiles(queries, keys, more_keys)


@plans("qswin::window_attention")
def _plan(
    qkv: Tensor,
    bias: Tensor | None,
    num_tokens: int,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Launch:
    num_masks, num_heads = 1 if bias is None else bias.shape[0], qk_scale.shape[0]
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=qkv.dtype, device=qkv.device)
    num_windows, tile = rows // num_tokens, tiles(num_tokens, biased=bias is not None)
    small = tile.queries == tile.all_keys and not statically_known_true(num_windows * num_heads < SMALL_GRID)
    windows_per_program = WINDOWS_PER_PROGRAM if small else 1
    arguments: dict[str, Any] = {"qkv_ptr": qkv, "bias_ptr": qk_scale if bias is None else bias}
    arguments |= {"qk_scale_ptr": qk_scale, "out_ptr": out}
    arguments |= {"num_windows": num_windows, "num_masks": num_masks, "num_heads": num_heads}
    arguments |= {"probs_inv_scale": probs_inv_scale, "av_scale": av_scale}
    arguments |= {"NUM_TOKENS": num_tokens, "CHANNELS": channels, "HEAD_DIM": channels // num_heads}
    arguments |= {"QUERIES": tile.queries, "KEYS": tile.keys, "MORE_KEYS": tile.more_keys}
    arguments |= {"WINDOWS_PER_PROGRAM": windows_per_program, "BIAS": bias is not None, "UNSIGNED": unsigned}
    programs = num_masks * num_heads * triton.cdiv(num_tokens, tile.queries)
    grid = (programs, triton.cdiv(num_windows, num_masks * windows_per_program))
    return Launch(_attention_kernel, grid, arguments, {"num_warps": 4}, out)


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
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
        bias: (M, heads, N, P) float16 as `padded_bias` returns it: position bias plus mask; window w has mask w % M.
            None where nothing is added.
        num_tokens: N, at most `MAX_TOKENS`.
        qk_scale: (heads,) float32: the scale of q times that of k, times what else a head's scores are multiplied by.
        probs_inv_scale: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.
        unsigned: whether the probabilities' levels are 0 to 255 where the others are int8.

    Returns:
        (W * N, heads * D) of qkv's dtype.
    """
    launch = _plan(qkv, bias, num_tokens, qk_scale, probs_inv_scale, av_scale, unsigned)
    wrap_triton(_attention_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


def padded_bias(bias: Tensor) -> Tensor:
    """Position bias plus mask (M, heads, N, N) as the kernel reads it, times LOG2E: float16, a column for each key.

    Each row's largest value is taken off: softmax does not see it, and float16 has no digits to spare for the 16 that
    Swin V2's biases reach. No token attends to the new columns.
    """
    extra = tiles(bias.shape[-1]).all_keys - bias.shape[-1]
    bias = (bias - bias.amax(dim=-1, keepdim=True)) * LOG2E.value
    return F.pad(bias, (0, extra), value=-float("inf")).half().contiguous()


@window_attention.register_kernel("cpu")
def window_attention_reference(
    qkv: Tensor,
    bias: Tensor | None,
    num_tokens: int,
    qk_scale: Tensor,
    probs_inv_scale: float,
    av_scale: float,
    unsigned: bool,
) -> Tensor:
    """`window_attention` in plain torch: the sums are exact in float64."""
    num_heads, head_dim = len(qk_scale), qkv.shape[1] // 3 // len(qk_scale)
    q, k, v = qkv.view(-1, num_tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)  # each (W, heads, N, D)
    scores = (q.double() @ k.double().transpose(-2, -1)).float() * qk_scale[:, None, None]
    if bias is not None:
        bias = bias[..., :num_tokens].float() / LOG2E.value
        scores = (scores.view(-1, *bias.shape) + bias).view(scores.shape)
    probs = scores.softmax(-1) * probs_inv_scale
    q_probs = UINT8.nearest(probs) if unsigned else to_levels_reference(probs, v.dtype)
    values = (q_probs.double() @ v.double()).float() * av_scale
    return to_levels_reference(values, v.dtype).transpose(1, 2).flatten(2).flatten(0, 1)
