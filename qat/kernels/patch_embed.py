"""Patch embedding in INT8 or FP8: quantization of the image, a matrix product and LayerNorm in one pass."""

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

BLOCK_M = 64  # patches that a program takes


@triton.jit
def _patch_embed_kernel(
    image_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, M, inv_scale, eps,
    IN_CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The product of M patches (M, K) and the weight (N, K): an image is read as rows of K = IN_CHANNELS * PATCH**2."""
    GRID_W: tl.constexpr = WIDTH // PATCH
    NUM_PATCHES: tl.constexpr = (HEIGHT // PATCH) * GRID_W
    K: tl.constexpr = IN_CHANNELS * PATCH * PATCH
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    m_mask, k_mask, n_mask = offs_m < M, offs_k < K, offs_n < N
    patch_id = offs_m % NUM_PATCHES
    patch_offsets = (
        (offs_m // NUM_PATCHES).to(tl.int64) * (IN_CHANNELS * HEIGHT * WIDTH)
        + (patch_id // GRID_W) * (PATCH * WIDTH)
        + (patch_id % GRID_W) * PATCH
    )
    pixel_offsets = (offs_k // (PATCH * PATCH)) * (HEIGHT * WIDTH) + (offs_k // PATCH % PATCH) * WIDTH + offs_k % PATCH
    image_ptrs = image_ptr + patch_offsets[:, None] + pixel_offsets[None, :]
    x = tl.load(image_ptrs, mask=m_mask[:, None] & k_mask[None, :], other=0.0)
    weight_ptrs = weight_ptr + offs_n[None, :] * K + offs_k[:, None]
    weight = tl.load(weight_ptrs, mask=n_mask[None, :] & k_mask[:, None], other=0.0)
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    q_x = to_levels(x.to(tl.float32) * tl.cast(inv_scale, tl.float32), weight_ptr.dtype.element_ty)
    acc = tl.dot(q_x, weight, out_dtype=SUM)
    scale, bias = (
        tl.load(scale_ptr + offs_n, mask=n_mask, other=0.0),
        tl.load(bias_ptr + offs_n, mask=n_mask, other=0.0),
    )
    y = acc.to(tl.float32) * scale[None, :] + bias[None, :]
    norm_weight = tl.load(norm_weight_ptr + offs_n, mask=n_mask, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + offs_n, mask=n_mask, other=0.0)
    y = layer_norm(y, n_mask[None, :], norm_weight[None, :], norm_bias[None, :], eps, N)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@plans("qswin::patch_embed")
def _plan(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inv_scale: float,
    eps: float,
    dtype: torch.dtype,
) -> Launch:
    batch, in_channels, height, width = image.shape
    channels, patch = weight.shape[0], weight.shape[2]
    num_patches = height // patch * (width // patch)
    out = torch.empty((batch, num_patches, channels), dtype=dtype, device=image.device)
    arguments: dict[str, Any] = {"image_ptr": image, "weight_ptr": weight, "scale_ptr": scale, "bias_ptr": bias}
    arguments |= {"norm_weight_ptr": norm_weight, "norm_bias_ptr": norm_bias, "out_ptr": out}
    arguments |= {"M": batch * num_patches, "inv_scale": inv_scale, "eps": eps}
    arguments |= {"IN_CHANNELS": in_channels, "HEIGHT": height, "WIDTH": width, "PATCH": patch, "N": channels}
    arguments |= {"BLOCK_M": BLOCK_M, "BLOCK_K": max(32, triton.next_power_of_2(in_channels * patch * patch))}
    arguments |= {"BLOCK_N": max(32, triton.next_power_of_2(channels))}
    grid = (triton.cdiv(batch * num_patches, BLOCK_M),)
    return Launch(_patch_embed_kernel, grid, arguments, {"num_warps": 4}, out)


@triton_op("qswin::patch_embed", mutates_args={})
def patch_embed(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inv_scale: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(conv(q) * scale + bias), q being the levels nearest to image * inv_scale in the format of the weight.

    The convolution's stride is its kernel size P.

    Args:
        image: (B, in_channels, H, W), float16 or float32; H and W are multiples of P.
        weight: (C, in_channels, P, P) int8 or float8_e4m3fn.
        scale: (C,) float32: the scale of the image times that of each channel's weights.
        bias, norm_weight, norm_bias: (C,) float32.
        inv_scale: 1 / the scale of the image.
        dtype: of the result.

    Returns:
        (B, H / P * W / P, C) of dtype.
    """
    launch = _plan(image, weight, scale, bias, norm_weight, norm_bias, inv_scale, eps, dtype)
    wrap_triton(_patch_embed_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@patch_embed.register_kernel("cpu")
def patch_embed_reference(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inv_scale: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`patch_embed` in plain torch: the sums are exact in float64."""
    q_image = to_levels_reference(image.float() * inv_scale, weight.dtype).double()
    sums = F.conv2d(q_image, weight.double(), stride=weight.shape[2]).flatten(2).transpose(1, 2)
    return F.layer_norm(sums.float() * scale + bias, scale.shape, norm_weight, norm_bias, eps).to(dtype)
