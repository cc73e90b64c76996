"""LayerNorm and the residual add of Swin V2 in one pass; each row is added to the token that it came from."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.launch import Launch, plans
from qswin.qat.kernels.layer_norm import layer_norm

TILE_SIZE = 2048  # values that a program holds


@triton.jit
def _norm_add_kernel(
    y_ptr, shortcut_ptr, token_ids_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, eps,
    ROWS_PER_IMAGE: tl.constexpr, NUM_TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_CHANNELS)
    col_mask = (cols < CHANNELS)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * CHANNELS + cols[None, :]
    y = tl.load(y_ptrs, mask=(rows < num_rows)[:, None] & col_mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < CHANNELS, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < CHANNELS, other=0.0)
    token_ids = tl.load(token_ids_ptr + rows % ROWS_PER_IMAGE, mask=rows < num_rows, other=-1)
    offsets = ((rows // ROWS_PER_IMAGE).to(tl.int64) * NUM_TOKENS + token_ids)[:, None] * CHANNELS + cols[None, :]
    mask = (token_ids >= 0)[:, None] & col_mask
    x = tl.load(shortcut_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x += layer_norm(y, col_mask, weight[None, :], bias[None, :], eps, CHANNELS)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


@plans("qswin::norm_add")
def _plan(y: Tensor, shortcut: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Launch:
    num_rows, channels = y.shape
    out = torch.empty_like(shortcut)
    block_channels = triton.next_power_of_2(channels)
    block_rows = max(1, TILE_SIZE // block_channels)
    arguments: dict[str, Any] = {"y_ptr": y, "shortcut_ptr": shortcut, "token_ids_ptr": token_ids, "weight_ptr": weight}
    arguments |= {"bias_ptr": bias, "out_ptr": out, "num_rows": num_rows, "eps": eps}
    arguments |= {"ROWS_PER_IMAGE": token_ids.shape[0], "NUM_TOKENS": shortcut.shape[1]}
    arguments |= {"CHANNELS": channels, "BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels}
    return Launch(_norm_add_kernel, (triton.cdiv(num_rows, block_rows),), arguments, {"num_warps": 1}, out)


@triton_op("qswin::norm_add", mutates_args={})
def norm_add(y: Tensor, shortcut: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """shortcut + LayerNorm(y), each row of y being added to its token.

    Args:
        y: (B * R, C) float16 or float32.
        shortcut: (B, L, C), float16 or float32.
        token_ids: (R,) int32: the token of an image, 0..L-1, that each of its R rows of y belongs to, each token once;
            -1 for a row of padding, which is dropped.
        weight, bias: (C,) float32.

    Returns:
        (B, L, C) of the shortcut's dtype.
    """
    launch = _plan(y, shortcut, token_ids, weight, bias, eps)
    wrap_triton(_norm_add_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@norm_add.register_kernel("cpu")
def norm_add_reference(
    y: Tensor, shortcut: Tensor, token_ids: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`norm_add` in plain torch."""
    normed = F.layer_norm(y.float(), weight.shape, weight, bias, eps).view(shortcut.shape[0], token_ids.shape[0], -1)
    mask = token_ids >= 0
    out = shortcut.float().clone()
    out[:, token_ids[mask].long()] += normed[:, mask]
    return out.to(shortcut.dtype)
