"""LayerNorm and the residual add of Swin V2 in one pass, over rows that go back to where an index took them from."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.layer_norm import layer_norm

TILE = 2048  # values that a program holds


@triton.jit
def _kernel(
    y_ptr, shortcut_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, rows, in_rows, out_rows, eps,
    CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CHANNELS)
    within = (channel < CHANNELS)[None, :]
    inside = (row < rows)[:, None] & within
    y = tl.load(y_ptr + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < CHANNELS, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0)
    target = tl.load(index_ptr + row % in_rows, mask=row < rows, other=-1)
    offset = ((row // in_rows).to(tl.int64) * out_rows + target)[:, None] * CHANNELS + channel[None, :]
    kept = (target >= 0)[:, None] & within
    x = tl.load(shortcut_ptr + offset, mask=kept, other=0.0).to(tl.float32)
    x += layer_norm(y, within, weight[None, :], bias[None, :], eps, CHANNELS)
    tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=kept)


@triton_op("qswin::norm_add", mutates_args={})
def norm_add(y: Tensor, shortcut: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """shortcut + LayerNorm(y), whose rows go back to where `index` took them from.

    Args:
        y: (B * R, C) float16 or float32.
        shortcut: (B, L, C), likewise.
        index: (R,) int32, as of `linear_add`: the row of an image that each row of y belongs to; -1 for padding.
        weight, bias: (C,) float32.

    Returns:
        (B, L, C) of the shortcut's dtype.
    """
    rows, channels = y.shape
    out = torch.empty_like(shortcut)
    columns = triton.next_power_of_2(channels)
    block = max(1, TILE // columns)
    wrap_triton(_kernel)[(triton.cdiv(rows, block),)](
        y, shortcut, index, weight, bias, out, rows, index.shape[0], shortcut.shape[1], eps,
        CHANNELS=channels, BLOCK_ROWS=block, BLOCK_CHANNELS=columns, num_warps=1,
    )  # fmt: skip
    return out


@norm_add.register_kernel("cpu")
def reference(y: Tensor, shortcut: Tensor, index: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`norm_add` in plain torch."""
    normed = F.layer_norm(y.float(), weight.shape, weight, bias, eps).view(shortcut.shape[0], index.shape[0], -1)
    kept = index >= 0
    out = shortcut.float().clone()
    out[:, index[kept].long()] += normed[:, kept]
    return out.to(shortcut.dtype)
