"""A kernel as an operator of torch: the sum of two INT8 tensors, requantized. On a CPU it runs as its reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import to_int8, to_levels_reference
from qswin.qat.kernels.launch import Launch, plans


@triton.jit
def _add_quantize_kernel(x_ptr, y_ptr, out_ptr, x_scale, y_scale, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32) * tl.cast(x_scale, tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0).to(tl.float32) * tl.cast(y_scale, tl.float32)
    tl.store(out_ptr + offsets, to_int8(x + y), mask=mask)


@plans("qswin_example::add_quantize")
def _plan(x: Tensor, y: Tensor, x_scale: float, y_scale: float) -> Launch:
    out = torch.empty_like(x)
    arguments = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "x_scale": x_scale, "y_scale": y_scale}
    arguments |= {"size": x.numel(), "BLOCK": 1024}
    return Launch(_add_quantize_kernel, (triton.cdiv(x.numel(), 1024),), arguments, {"num_warps": 4}, out)


@triton_op("qswin_example::add_quantize", mutates_args={})
def add_quantize(x: Tensor, y: Tensor, x_scale: float, y_scale: float) -> Tensor:
    """int8(x * x_scale + y * y_scale).

    Args:
        x, y: int8 of one shape, contiguous.
        x_scale, y_scale: the scale of x and of y, each over that of the result.
    """
    launch = _plan(x, y, x_scale, y_scale)
    wrap_triton(_add_quantize_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@add_quantize.register_kernel("cpu")
def add_quantize_reference(x: Tensor, y: Tensor, x_scale: float, y_scale: float) -> Tensor:
    """`add_quantize` in plain torch."""
    return to_levels_reference(x.float() * x_scale + y.float() * y_scale, torch.int8)
