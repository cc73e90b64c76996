"""Rounding to INT8, the same in a kernel and in its reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Added to a float32 below 2**22 and taken away again, it leaves the nearest integer, ties to even: what rint does, without
# a library that Triton's interpreter lacks.
MAGIC = tl.constexpr(1.5 * 2**23)


@triton.jit
def to_int8(x):
    """float32 levels, rounded and saturated."""
    rounded = (tl.minimum(tl.maximum(x, -128.0), 127.0) + MAGIC) - MAGIC
    return rounded.to(tl.int8)


def reference_to_int8(x: Tensor) -> Tensor:
    """`to_int8` in torch."""
    return x.clamp(-128, 127).round().to(torch.int8)
