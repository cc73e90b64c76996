"""Fake quantization as pure functions: no state, no policy.

All of it is symmetric: the real value of level q is q * scale, and scale = amax / qmax with qmax = 2**(bits - 1) - 1.
"""

from typing import Any

import torch
from torch import Tensor


class _FakeQuantize(torch.autograd.Function):
    """Rounds to the grid; gradients pass straight through inside the range and reach the scale as in LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        levels = torch.div(x.float(), scale)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(levels.clone())
        rounded = levels.round_()
        clipped = rounded.clamp(qmin, qmax)
        if not ctx.needs_input_grad[1] and ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded == clipped)
        ctx.limits, ctx.scale_shape = (qmin, qmax), scale.shape
        return clipped.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return torch.where(saved, grad, 0.0), None, None, None  # grad * saved would convert the mask: half as fast
        rounded = saved.round()
        clipped = rounded.clamp(*ctx.limits)
        inside = rounded == clipped
        grad_scale = grad * torch.where(inside, rounded - saved, clipped)
        return grad * inside, grad_scale.sum_to_size(ctx.scale_shape), None, None


def fake_quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Rounds x to the nearest of the levels qmin..qmax times scale; ties go to the even level, as in ONNX.

    The gradient of x is the straight-through estimator: 1 where round(x / scale) lies in [qmin, qmax], else 0. The gradient
    of scale is LSQ's (Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 3).

    Args:
        x: any shape and floating dtype; rounding is done in float32.
        scale: float32, positive, of a shape that broadcasts to x's.

    Returns:
        A tensor of x's shape and dtype.
    """
    return _FakeQuantize.apply(x, scale, qmin, qmax)


def least_squares_amax(x: Tensor, amax: Tensor, qmin: int, qmax: int, candidates: int = 64) -> Tensor:
    """The ranges with the least squared quantization error, of `candidates` even steps from amax / 4 to amax.

    Args:
        x: any shape.
        amax: the largest ranges to try, one or one a channel; of as many dimensions as x, or none.

    Returns:
        Ranges of amax's shape.
    """
    x = x / torch.where(amax > 0, amax, 1.0)  # in units of amax, or the squares of small values vanish
    best, least = torch.ones_like(amax), torch.full_like(amax, float("inf"))
    for share in torch.linspace(0.25, 1.0, candidates).tolist():
        scale = share / qmax
        error = (torch.clamp((x / scale).round_(), qmin, qmax).mul_(scale) - x).square_().sum_to_size(amax.shape)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    return best * amax


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def quantize_dequantize(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    """One ONNX QuantizeLinear and one DequantizeLinear node of INT8, for use while torch.onnx exports.

    Args:
        x: any shape, float32.
        scale: one value, or one for each index of dimension `axis`.
        axis: the dimension that the scales belong to; None for one scale.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    scale = scale.reshape(()) if axis is None else scale.flatten()
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)
    quantized = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), attributes, dtype=torch.int8, shape=x.shape
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (quantized, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape
    )
