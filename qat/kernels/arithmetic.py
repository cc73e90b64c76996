"""Arithmetic that the kernels share: rounding to INT8 or FP8, GELU.

On a GPU each is a few machine instructions, written out as PTX: they run once for every value that a layer computes,
and in Triton's own form took longer than the matrix products. Triton's interpreter, which tests use, cannot run PTX:
there the same values come from Triton's operations.

Kernels cast each Python float argument to float32. Torch 2.11's Inductor compiles such arguments as float64: without
the cast all that depends on them would be computed in float64, in registers of twice the width that the PTX reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qswin.calib.grid import FP8, INT8

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
QMIN, QMAX = tl.constexpr(float(INT8.qmin)), tl.constexpr(float(INT8.qmax))  # int8's own limits, at which PTX saturates
FP8_MAX = tl.constexpr(FP8.qmax)
# Added to a float32 below 2**22 and subtracted again, it leaves the nearest integer, ties to even. This is rint, which
# Triton's interpreter lacks.
ROUNDING = tl.constexpr(1.5 * 2**23)
SMALLEST_NORMAL, SUBNORMAL_ROUNDING = tl.constexpr(2.0**-6), tl.constexpr(1.5 * 2**14)  # of E4M3; to steps of 2**-9

# GELU(y) = y * (1 + tanh(y * p(y**2))) / 2, where p has these coefficients: the minimax fit on [-8, 8]. Its largest
# error is 2.7e-4, half that of the usual ones (0.79788 and 0.03568). The hardware's tanh adds up to 2.5e-4 * |y|.
GELU_1, GELU_0 = tl.constexpr(0.03470089), tl.constexpr(0.80015708)

# One line each: Inductor copies such constants into the source of a kernel, where a line break would end the string.
_TO_INT8 = tl.constexpr(
    "{ .reg .s32 a, b, c, d, high;"
    " cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;"
    " cvt.pack.sat.s8.s32.b32 high, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, high; }"
)


@triton.jit
def to_int8(x):
    """float32 in units of the scale -> int8, rounded to nearest, ties to even, and saturated."""
    if INTERPRETED:
        q_x = ((tl.minimum(tl.maximum(x, QMIN), QMAX) + ROUNDING) - ROUNDING).to(tl.int8)
    else:
        q_x = tl.inline_asm_elementwise(_TO_INT8, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    return q_x


@triton.jit
def _round_to_e4m3(x):
    """float32 -> the nearest value of E4M3, in float32: the interpreter's own conversion loses the carry to 2**n."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, (x + SUBNORMAL_ROUNDING) - SUBNORMAL_ROUNDING, rounded)


@triton.jit
def to_levels(x, dtype: tl.constexpr):
    """float32 in units of the scale -> the nearest level of a format, int8 or float8e4nv, saturated.

    For FP8 the clamp is no instruction of its own: the conversion saturates on a GPU, two values at a time.
    """
    if dtype == tl.int8:
        levels = to_int8(x)
    elif INTERPRETED:
        levels = _round_to_e4m3(tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)).to(dtype)
    else:
        levels = x.to(dtype)
    return levels


@triton.jit
def gelu(y, factor):
    """GELU(y) * factor of float32; the error of GELU is below 3e-4 + 2.5e-4 * |y|."""
    z = y * (GELU_1 * (y * y) + GELU_0)
    if INTERPRETED:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z))
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
    half = y * (0.5 * factor)
    return half * tanh + half


def to_levels_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`to_levels` in plain torch."""
    return (INT8 if dtype == torch.int8 else FP8).nearest(x).to(dtype)
