"""Fake quantization as pure functions: no state, no policy.

All is symmetric: the real value of level q is q * scale, and scale = amax / qmax. What the levels are is a `Grid`'s.
"""

from typing import Any

import torch
from torch import Tensor

from qswin.calib.grid import Grid


class _FakeQuantize(torch.autograd.Function):
    """Rounds to the grid; gradients pass straight through inside the range and reach the scale as in LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        levels = torch.div(x.float(), scale)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(levels)
        levels = grid.round(levels)
        clipped = grid.clip(levels)
        if not ctx.needs_input_grad[1] and ctx.needs_input_grad[0]:
            ctx.save_for_backward(levels == clipped)
        ctx.grid, ctx.scale_shape = grid, scale.shape
        # torch 2.11 compiles no gradient for an output that an operator returns as it got it: mul_, `to` its own dtype.
        value = clipped * scale if torch.compiler.is_compiling() else clipped.mul_(scale)
        return value if value.dtype == x.dtype else value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return torch.where(saved, grad, 0.0), None, None  # grad * saved would convert the mask: half as fast
        rounded = ctx.grid.round(saved)
        clipped = ctx.grid.clip(rounded)
        inside = rounded == clipped
        grad_scale = grad * torch.where(inside, rounded - saved, clipped)
        return grad * inside, grad_scale.sum_to_size(ctx.scale_shape), None


def fake_quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Rounds x to the nearest level of the grid, times scale; ties go to the even level, as in ONNX.

    The gradient of x is the straight-through estimator: 1 where the nearest level lies within the grid, else 0. The
    gradient of scale is LSQ's (Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 3).

    Args:
        x: any shape and floating dtype; rounding is done in float32.
        scale: float32, positive, of a shape that broadcasts to x's.

    Returns:
        A tensor of x's shape and dtype.
    """
    return _FakeQuantize.apply(x, scale, grid)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def quantize_dequantize(x: Tensor, scale: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """One ONNX QuantizeLinear and one DequantizeLinear node, for use while torch.onnx exports.

    Args:
        x: any shape, float32.
        scale: one value, or one for each index of dimension `axis`.
        axis: the dimension that the scales belong to; None for one scale.
        dtype: of the levels between the two nodes.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    scale = scale.reshape(()) if axis is None else scale.flatten()
    zero_point = torch.zeros(scale.shape, dtype=dtype)
    quantized = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), attributes, dtype=dtype, shape=x.shape
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (quantized, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape
    )
