"""The average of an image's tokens, quantized: what the classifier reads."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import to_levels, to_levels_reference
from qswin.qat.kernels.launch import Launch, plans

BLOCK_TOKENS, BLOCK_CHANNELS = 16, 128  # that a program takes at once


@triton.jit
def _pool_quantize_kernel(
    x_ptr, inv_scale_ptr, out_ptr, num_tokens, CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of an image, summed in float32."""
    image = tl.program_id(0)
    offs_t, cols = tl.arange(0, BLOCK_TOKENS), tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    x_ptr += image.to(tl.int64) * num_tokens * CHANNELS
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_TOKENS):
        mask = (start + offs_t < num_tokens)[:, None] & (cols < CHANNELS)[None, :]
        x = tl.load(x_ptr + (start + offs_t)[:, None] * CHANNELS + cols[None, :], mask=mask, other=0.0)
        sums += x.to(tl.float32)
    inv_scale = tl.load(inv_scale_ptr + cols, mask=cols < CHANNELS, other=0.0)
    levels = to_levels(tl.sum(sums, axis=0) / num_tokens * inv_scale, out_ptr.dtype.element_ty)
    tl.store(out_ptr + image.to(tl.int64) * CHANNELS + cols, levels, mask=cols < CHANNELS)


@plans("qswin::pool_quantize")
def _plan(x: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Launch:
    batch, num_tokens, channels = x.shape
    out = torch.empty((batch, channels), dtype=dtype, device=x.device)
    arguments: dict[str, Any] = {"x_ptr": x, "inv_scale_ptr": inv_scale, "out_ptr": out, "num_tokens": num_tokens}
    arguments |= {"CHANNELS": channels, "BLOCK_TOKENS": BLOCK_TOKENS, "BLOCK_CHANNELS": BLOCK_CHANNELS}
    grid = (batch, triton.cdiv(channels, BLOCK_CHANNELS))
    return Launch(_pool_quantize_kernel, grid, arguments, {"num_warps": 1}, out)


@triton_op("qswin::pool_quantize", mutates_args={})
def pool_quantize(x: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels of a format nearest to the mean of x over its tokens, times inv_scale.

    Args:
        x: (B, L, C), float16 or float32, contiguous.
        inv_scale: (C,) float32, what each channel is multiplied by.
        dtype: of the levels, int8 or float8_e4m3fn.

    Returns:
        (B, C) of dtype.
    """
    launch = _plan(x, inv_scale, dtype)
    wrap_triton(_pool_quantize_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@pool_quantize.register_kernel("cpu")
def pool_quantize_reference(x: Tensor, inv_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`pool_quantize` in plain torch."""
    return to_levels_reference(x.float().mean(dim=1) * inv_scale, dtype)
