"""Patch embedding in INT8: images quantized as they are read, the convolution as a product, its LayerNorm; one pass."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import reference_to_int8, to_int8
from qswin.qat.kernels.layer_norm import layer_norm

PATCHES = 64  # that a program takes


@triton.jit
def _kernel(
    image_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, patches, inverse, eps,
    COLOURS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = WIDTH // SIDE
    EACH: tl.constexpr = (HEIGHT // SIDE) * ACROSS
    K: tl.constexpr = COLOURS * SIDE * SIDE
    patch, k, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_CHANNELS)
    place = patch % EACH
    corner = (
        (patch // EACH).to(tl.int64) * (COLOURS * HEIGHT * WIDTH)
        + (place // ACROSS) * (SIDE * WIDTH)
        + (place % ACROSS) * SIDE
    )
    pixel = (k // (SIDE * SIDE)) * (HEIGHT * WIDTH) + (k // SIDE % SIDE) * WIDTH + k % SIDE
    real = patch < patches
    x = tl.load(image_ptr + corner[:, None] + pixel[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
    weight = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(n < CHANNELS)[None, :] & (k < K)[:, None], other=0)
    total = tl.dot(to_int8(x.to(tl.float32) * tl.cast(inverse, tl.float32)), weight, out_dtype=tl.int32)
    inside = n < CHANNELS
    scale, bias = tl.load(scale_ptr + n, mask=inside, other=0.0), tl.load(bias_ptr + n, mask=inside, other=0.0)
    y = total.to(tl.float32) * scale[None, :] + bias[None, :]
    norm_weight = tl.load(norm_weight_ptr + n, mask=inside, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + n, mask=inside, other=0.0)
    y = layer_norm(y, inside[None, :], norm_weight[None, :], norm_bias[None, :], eps, CHANNELS)
    out = out_ptr + patch.to(tl.int64)[:, None] * CHANNELS + n[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton_op("qswin::patch_embed", mutates_args={})
def patch_embed(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inverse: float,
    eps: float,
) -> Tensor:
    """LayerNorm(conv(int8(image * inverse)) * scale + bias), the convolution's stride being its kernel's side.

    Args:
        image: (B, colours, H, W), float16 or float32; H and W are multiples of the side.
        weight: (C, colours, side, side) int8.
        scale: (C,) float32: the scale of the image times that of each channel's weights.
        bias, norm_weight, norm_bias: (C,) float32.
        inverse: 1 / the scale of the image.

    Returns:
        (B, H / side * W / side, C) of the image's dtype.
    """
    batch, colours, height, width = image.shape
    channels, side = weight.shape[0], weight.shape[2]
    each = height // side * (width // side)
    out = torch.empty((batch, each, channels), dtype=image.dtype, device=image.device)
    wrap_triton(_kernel)[(triton.cdiv(batch * each, PATCHES),)](
        image, weight, scale, bias, norm_weight, norm_bias, out, batch * each, inverse, eps,
        COLOURS=colours, HEIGHT=height, WIDTH=width, SIDE=side, CHANNELS=channels,
        BLOCK=PATCHES, BLOCK_K=max(32, triton.next_power_of_2(colours * side * side)),
        BLOCK_CHANNELS=max(32, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip
    return out


@patch_embed.register_kernel("cpu")
def reference(
    image: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inverse: float,
    eps: float,
) -> Tensor:
    """`patch_embed` in plain torch: the integer sums are exact in float64."""
    levels = reference_to_int8(image.float() * inverse).double()
    sums = F.conv2d(levels, weight.double(), stride=weight.shape[2]).flatten(2).transpose(1, 2)
    return F.layer_norm(sums.float() * scale + bias, scale.shape, norm_weight, norm_bias, eps).to(image.dtype)
