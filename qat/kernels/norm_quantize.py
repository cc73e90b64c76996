"""Quantization, with LayerNorm or without, of tokens in any order: windows, shifted or not, and 2x2 patches to merge.

Roll, window partition and the concatenation of neighbours become the order in which tokens are read: nothing is copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import to_levels, to_levels_reference
from qswin.qat.kernels.launch import Launch, plans
from qswin.qat.kernels.layer_norm import layer_norm


@triton.jit
def _norm_quantize_kernel(
    x_ptr, token_ids_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, eps, inv_scale,
    ROWS_PER_IMAGE: tl.constexpr, NUM_TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A tile is (rows, tokens of a row, channels), so that the compiler sees that channels are contiguous.

    Without NORM there is neither bias nor inv_scale: x is multiplied by the weight.
    """
    start_row = tl.program_id(0) * BLOCK_ROWS
    offs_r, offs_t, offs_c = tl.arange(0, BLOCK_ROWS), tl.arange(0, TOKENS), tl.arange(0, BLOCK_CHANNELS)
    rows = start_row + offs_r
    row_mask = rows < num_rows
    channel_mask = (offs_c < CHANNELS)[None, None, :]
    token_ids_ptrs = token_ids_ptr + (rows % ROWS_PER_IMAGE)[:, None] * TOKENS + offs_t[None, :]
    token_ids = tl.load(token_ids_ptrs, mask=row_mask[:, None], other=-1)
    x_offsets = ((rows // ROWS_PER_IMAGE).to(tl.int64)[:, None] * NUM_TOKENS + token_ids) * CHANNELS
    token_mask = (token_ids >= 0)[:, :, None]
    x_ptrs = x_ptr + x_offsets[:, :, None] + offs_c[None, None, :]
    x = tl.load(x_ptrs, mask=token_mask & channel_mask, other=0.0).to(tl.float32)
    cols = offs_t[None, :, None] * CHANNELS + offs_c[None, None, :]
    weight = tl.load(weight_ptr + cols, mask=channel_mask, other=0.0)
    if NORM:
        bias = tl.load(bias_ptr + cols, mask=channel_mask, other=0.0)
        x = layer_norm(x, channel_mask, weight, bias, eps, TOKENS * CHANNELS)
        if TOKENS == 1:  # windows are padded with zeros behind the norm
            x = tl.where(token_mask, x, 0.0)
        x *= tl.cast(inv_scale, tl.float32)
    else:
        x *= weight
    out_ptrs = (
        out_ptr + start_row.to(tl.int64) * (TOKENS * CHANNELS) + offs_r[:, None, None] * (TOKENS * CHANNELS) + cols
    )
    tl.store(out_ptrs, to_levels(x, out_ptr.dtype.element_ty), mask=row_mask[:, None, None] & channel_mask)


def _plan(
    x: Tensor,
    token_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: float,
    dtype: torch.dtype,
    norm: bool,
) -> Launch:
    batch, num_tokens, channels = x.shape
    rows_per_image, tokens = token_ids.shape
    num_rows = batch * rows_per_image
    out = torch.empty((num_rows, tokens * channels), dtype=dtype, device=x.device)
    block_channels = triton.next_power_of_2(channels)
    # Values that a program holds, and its warps: the fastest of a sweep on an H200.
    tile_size, num_warps = (2048, 1) if tokens == 1 else (4096, 4)
    block_rows = max(1, tile_size // (tokens * block_channels))
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "token_ids_ptr": token_ids,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
    }
    arguments |= {"num_rows": num_rows, "eps": eps, "inv_scale": inv_scale}
    arguments |= {"ROWS_PER_IMAGE": rows_per_image, "NUM_TOKENS": num_tokens, "CHANNELS": channels, "TOKENS": tokens}
    arguments |= {"BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels, "NORM": norm}
    grid = (triton.cdiv(num_rows, block_rows),)
    return Launch(_norm_quantize_kernel, grid, arguments, {"num_warps": num_warps}, out)


def _run(launch: Launch) -> Tensor:
    wrap_triton(_norm_quantize_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@plans("qswin::norm_quantize")
def _plan_norm(
    x: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float, inv_scale: float, dtype: torch.dtype
) -> Launch:
    return _plan(x, token_ids, weight, bias, eps, inv_scale, dtype, norm=True)


@triton_op("qswin::norm_quantize", mutates_args={})
def norm_quantize(
    x: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float, inv_scale: float, dtype: torch.dtype
) -> Tensor:
    """The levels of a format nearest to LayerNorm(x[token_ids]) * inv_scale.

    Args:
        x: (B, L, C), float16 or float32.
        token_ids: (R, T) int32: the tokens of an image whose channels, side by side, are normalized as one row of the
            result; T is 1 or another power of two. -1 is padding: with T = 1 its row of the result is 0, as windows are
            padded behind the norm; with more tokens it is a token of zeros.
        weight, bias: (T * C,) float32.
        inv_scale: 1 / the scale of the result.
        dtype: of the levels, int8 or float8_e4m3fn.

    Returns:
        (B * R, T * C) of dtype.
    """
    return _run(_plan_norm(x, token_ids, weight, bias, eps, inv_scale, dtype))


@plans("qswin::gather_quantize")
def _plan_gather(x: Tensor, token_ids: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Launch:
    return _plan(x, token_ids, inv_scale, inv_scale, 0.0, 1.0, dtype, norm=False)


@triton_op("qswin::gather_quantize", mutates_args={})
def gather_quantize(x: Tensor, token_ids: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels of a format nearest to x[token_ids] * inv_scale.

    Arguments and result are those of `norm_quantize`, but inv_scale is (T * C,) float32, what each channel is
    multiplied by: 1 / the scale of the result, times the channel's own scale where the next layer has one.
    """
    return _run(_plan_gather(x, token_ids, inv_scale, dtype))


@norm_quantize.register_kernel("cpu")
def norm_quantize_reference(
    x: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float, inv_scale: float, dtype: torch.dtype
) -> Tensor:
    """`norm_quantize` in plain torch."""
    y = F.layer_norm(_gather(x, token_ids), weight.shape, weight, bias, eps)
    if token_ids.shape[1] == 1:
        y = y.masked_fill((token_ids < 0)[None], 0.0)
    return to_levels_reference(y * inv_scale, dtype).flatten(0, 1)


@gather_quantize.register_kernel("cpu")
def gather_quantize_reference(x: Tensor, token_ids: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`gather_quantize` in plain torch."""
    return to_levels_reference(_gather(x, token_ids) * inv_scale, dtype).flatten(0, 1)


def _gather(x: Tensor, token_ids: Tensor) -> Tensor:
    """(B, R, T * C) float32; padding is 0."""
    rows = x.float()[:, token_ids.clamp(min=0).flatten().long()].view(x.shape[0], *token_ids.shape, x.shape[2])
    return rows.masked_fill((token_ids < 0)[None, :, :, None], 0.0).flatten(2)
