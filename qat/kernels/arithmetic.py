"""Arithmetic that the kernels share: rounding to INT8, GELU.

On a GPU each is a few machine instructions, written out as PTX: they run once for every value that a layer computes, and in
Triton's own form took longer than the matrix products. Triton's interpreter, which tests use, cannot run PTX: there the same
values come from Triton's operations.

Kernels cast each Python float that they are given to float32: torch 2.11's Inductor compiles such arguments as float64, and
what they touch would be computed in float64, and end in registers of twice the width that the PTX reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Added to a float32 below 2**22 and taken away again, it leaves the nearest integer, ties to even: what rint does, without
# a library that Triton's interpreter lacks.
MAGIC = tl.constexpr(1.5 * 2**23)

# Phi(y) = 1 / (1 + 2**(y * q(y**2))), q being this polynomial in min(y**2, 40), highest power first: fitted on [-6.5, 6.5]
# so that the largest error of y * Phi(y), which is 2.6e-5, is as small as it gets with three coefficients.
GELU_2, GELU_1, GELU_0 = (tl.constexpr(-1.4426950408889634 * c) for c in (-7.03636305e-04, 7.40150518e-02, 1.59501155))
GELU_LARGEST_SQUARE = tl.constexpr(40.0)

# One line each: Inductor copies such constants into the source of a kernel, and a line break would end the string there.
_TO_INT8 = tl.constexpr(
    "{ .reg .s32 a, b, c, d, high;"
    " cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;"
    " cvt.pack.sat.s8.s32.b32 high, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, high; }"
)
_TIMES_LOGISTIC = tl.constexpr(
    "{ .reg .f32 e; ex2.approx.ftz.f32 e, $2; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e; }"
)


@triton.jit
def to_int8(x):
    """float32 levels, rounded to even and saturated."""
    if INTERPRETED:
        levels = ((tl.minimum(tl.maximum(x, -128.0), 127.0) + MAGIC) - MAGIC).to(tl.int8)
    else:
        levels = tl.inline_asm_elementwise(_TO_INT8, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    return levels


@triton.jit
def gelu(y):
    """y * Phi(y) of float32, with an error below 3e-5."""
    square = tl.minimum(y * y, GELU_LARGEST_SQUARE)
    exponent = y * ((GELU_2 * square + GELU_1) * square + GELU_0)
    if INTERPRETED:
        value = y / (1.0 + tl.exp2(exponent))
    else:
        value = tl.inline_asm_elementwise(_TIMES_LOGISTIC, "=f,f,f", [y, exponent], dtype=tl.float32, is_pure=True, pack=1)
    return value


def reference_to_int8(x: Tensor) -> Tensor:
    """`to_int8` in torch."""
    return x.clamp(-128, 127).round().to(torch.int8)
