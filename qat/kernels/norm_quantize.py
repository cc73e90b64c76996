"""LayerNorm and quantization in one pass, over rows gathered by an index: windows, shifted or not, and 2x2 patches to merge.

Roll, partition and the concatenation of neighbours are then an order of reading: nothing is copied.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qat.kernels.rounding import reference_to_int8, to_int8

TILE = 4096  # values a program holds


@triton.jit
def _kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, rows, out_rows, in_rows, channels, eps, inverse,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    width = PARTS * channels
    inside = (row < rows)[:, None] & (column < width)[None, :]
    part = column // channels
    source = tl.load(index_ptr + (row % out_rows)[:, None] * PARTS + part[None, :], mask=inside, other=-1)
    there = inside & (source >= 0)
    offset = ((row // out_rows)[:, None] * in_rows + source) * channels + (column - part * channels)[None, :]
    x = tl.load(x_ptr + offset, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
    y = centred * deviation[:, None] * weight[None, :] + bias[None, :]
    if PARTS == 1:  # a token that pads a window is 0 behind the norm
        y = tl.where(there, y, 0.0)
    tl.store(out_ptr + row[:, None] * width + column[None, :], to_int8(y * inverse), mask=inside)


@triton_op("qswin::norm_quantize", mutates_args={})
def norm_quantize(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, inverse: float) -> Tensor:
    """int8(LayerNorm(x[index]) * inverse).

    Args:
        x: (B, L, C), float16 or float32.
        index: (R, P) int32: the rows of an image whose channels, side by side, are normalised as one row of the result. -1
            is a row of padding: with P = 1 it gives zeros, as windows are padded behind the norm, else it counts as zeros.
        weight, bias: (P * C,) float32.
        inverse: 1 / the scale of the result.

    Returns:
        (B * R, P * C) int8.
    """
    batch, in_rows, channels = x.shape
    out_rows, parts = index.shape
    width = parts * channels
    out = torch.empty((batch * out_rows, width), dtype=torch.int8, device=x.device)
    columns = triton.next_power_of_2(width)
    block = max(1, TILE // columns)
    grid = (triton.cdiv(batch * out_rows, block),)
    wrap_triton(_kernel)[grid](
        x, index, weight, bias, out, batch * out_rows, out_rows, in_rows, channels, eps, inverse,
        PARTS=parts, BLOCK_ROWS=block, BLOCK_COLUMNS=columns, num_warps=4 if columns <= 1024 else 8,
    )  # fmt: skip
    return out


@norm_quantize.register_kernel("cpu")
def reference(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float, inverse: float) -> Tensor:
    """`norm_quantize` in plain torch."""
    rows = x.float()[:, index.clamp(min=0).flatten().long()].view(len(x), *index.shape, x.shape[2])
    rows = rows.masked_fill((index < 0)[None, :, :, None], 0.0).flatten(2)
    y = F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    if index.shape[1] == 1:
        y = y.masked_fill((index < 0)[None], 0.0)
    return reference_to_int8(y * inverse).flatten(0, 1)
