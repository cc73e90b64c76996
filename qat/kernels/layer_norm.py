"""LayerNorm: of a tile, for the kernels that have one, and as an operator where no quantization or add comes next."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.launch import Launch, plans

TILE_SIZE = 2048  # values that a program holds


@triton.jit
def layer_norm(x, mask, weight, bias, eps, NUM_CHANNELS: tl.constexpr):
    """LayerNorm of each row of a float32 tile.

    It takes loaded values. A helper that loads weight and bias itself would load them once for each row of the tile.

    Args:
        x: (rows, channels), or (rows, tokens, channels) where several tokens' channels are one row; 0 where masked.
        mask: (1, channels) or (1, 1, channels): which channels exist.
        weight, bias: (1, channels) or (1, tokens, channels).
        NUM_CHANNELS: the length of a row, without masked channels.
    """
    centred = tl.where(mask, x - _row_sum(x) / NUM_CHANNELS, 0.0)
    variance = _row_sum(centred * centred) / NUM_CHANNELS
    return centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * weight + bias


@triton.jit
def _row_sum(x):
    """The sum of each row, (rows, 1) or (rows, 1, 1)."""
    total = tl.sum(x, axis=len(x.shape) - 1)
    if len(x.shape) == 3:
        total = tl.sum(total, axis=1)[:, None]
    return total[:, None]


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, eps,
    CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_CHANNELS)
    col_mask = (cols < CHANNELS)[None, :]
    mask = (rows < num_rows)[:, None] & col_mask
    offsets = rows.to(tl.int64)[:, None] * CHANNELS + cols[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < CHANNELS, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < CHANNELS, other=0.0).to(tl.float32)
    y = layer_norm(x, col_mask, weight[None, :], bias[None, :], eps, CHANNELS)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@plans("qswin::norm")
def _plan(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Launch:
    channels = x.shape[-1]
    num_rows, out = x.numel() // channels, torch.empty_like(x)
    block_channels = triton.next_power_of_2(channels)
    block_rows = max(1, TILE_SIZE // block_channels)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "num_rows": num_rows,
        "eps": eps,
    }
    arguments |= {"CHANNELS": channels, "BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels}
    return Launch(_layer_norm_kernel, (triton.cdiv(num_rows, block_rows),), arguments, {"num_warps": 1}, out)


@triton_op("qswin::norm", mutates_args={})
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the last dimension of x, computed in float32.

    Args:
        x: (..., C), float16 or float32, contiguous.
        weight, bias: (C,), float16 or float32.

    Returns:
        A tensor like x.
    """
    launch = _plan(x, weight, bias, eps)
    wrap_triton(_layer_norm_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@norm.register_kernel("cpu")
def norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`norm` in plain torch."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
