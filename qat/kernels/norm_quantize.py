"""Quantization, with LayerNorm or without, in one pass over rows that an index names: windows, shifted or not, and 2x2
patches to merge.

Roll, partition and the concatenation of neighbours are then an order of reading: nothing is copied.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import reference_to_int8, to_int8
from qswin.qat.kernels.layer_norm import layer_norm


@triton.jit
def _kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, rows, out_rows, in_rows, eps, inverse,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A tile is (rows, parts, channels), so that the compiler sees that channels lie side by side."""
    first = tl.program_id(0) * BLOCK_ROWS
    local, part, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, PARTS), tl.arange(0, BLOCK_CHANNELS)
    row = first + local
    within = (channel < CHANNELS)[None, None, :]
    source = tl.load(index_ptr + (row % out_rows)[:, None] * PARTS + part[None, :], mask=(row < rows)[:, None], other=-1)
    start = ((row // out_rows).to(tl.int64)[:, None] * in_rows + source) * CHANNELS
    there = (source >= 0)[:, :, None]
    x = tl.load(x_ptr + start[:, :, None] + channel[None, None, :], mask=there & within, other=0.0).to(tl.float32)
    column = part[None, :, None] * CHANNELS + channel[None, None, :]
    if NORM:
        weight = tl.load(weight_ptr + column, mask=within, other=0.0)
        bias = tl.load(bias_ptr + column, mask=within, other=0.0)
        x = layer_norm(x, within, weight, bias, eps, PARTS * CHANNELS)
        if PARTS == 1:  # a token that pads a window is 0 behind the norm
            x = tl.where(there, x, 0.0)
    out = out_ptr + first.to(tl.int64) * (PARTS * CHANNELS) + local[:, None, None] * (PARTS * CHANNELS) + column
    tl.store(out, to_int8(x * tl.cast(inverse, tl.float32)), mask=(row < rows)[:, None, None] & within)


@triton_op("qswin::norm_quantize", mutates_args={})
def norm_quantize(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, inverse: float) -> Tensor:
    """int8(LayerNorm(x[index]) * inverse).

    Args:
        x: (B, L, C), float16 or float32.
        index: (R, P) int32: the rows of an image whose channels, side by side, are normalised as one row of the result. -1
            is a row of padding: with P = 1 it gives zeros, as windows are padded behind the norm, else it counts as zeros.
        weight, bias: (P * C,) float32; P is 1 or another power of two.
        inverse: 1 / the scale of the result.

    Returns:
        (B * R, P * C) int8.
    """
    return _quantize(x, index, weight, bias, eps, inverse, True)


@triton_op("qswin::gather_quantize", mutates_args={})
def gather_quantize(x: Tensor, index: Tensor, inverse: float) -> Tensor:
    """int8(x[index] * inverse), the arguments being those of `norm_quantize`."""
    return _quantize(x, index, x, x, 0.0, inverse, False)


def _quantize(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, inverse: float, norm: bool) -> Tensor:
    batch, in_rows, channels = x.shape
    out_rows, parts = index.shape
    out = torch.empty((batch * out_rows, parts * channels), dtype=torch.int8, device=x.device)
    columns = triton.next_power_of_2(channels)
    tile, warps = (2048, 1) if parts == 1 else (4096, 4)  # values that a program holds; the fastest of a sweep on an H200
    block = max(1, tile // (parts * columns))
    wrap_triton(_kernel)[(triton.cdiv(batch * out_rows, block),)](
        x, index, weight, bias, out, batch * out_rows, out_rows, in_rows, eps, inverse,
        CHANNELS=channels, PARTS=parts, BLOCK_ROWS=block, BLOCK_CHANNELS=columns, NORM=norm, num_warps=warps,
    )  # fmt: skip
    return out


@norm_quantize.register_kernel("cpu")
def reference(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, inverse: float) -> Tensor:
    """`norm_quantize` in plain torch."""
    y = F.layer_norm(_gather(x, index), weight.shape, weight, bias, eps)
    if index.shape[1] == 1:
        y = y.masked_fill((index < 0)[None], 0.0)
    return reference_to_int8(y * inverse).flatten(0, 1)


@gather_quantize.register_kernel("cpu")
def reference_gather(x: Tensor, index: Tensor, inverse: float) -> Tensor:
    """`gather_quantize` in plain torch."""
    return reference_to_int8(_gather(x, index) * inverse).flatten(0, 1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, R, P * C) float32; padding is 0."""
    rows = x.float()[:, index.clamp(min=0).flatten().long()].view(x.shape[0], *index.shape, x.shape[2])
    return rows.masked_fill((index < 0)[None, :, :, None], 0.0).flatten(2)
