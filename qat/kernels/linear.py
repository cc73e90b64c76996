"""INT8 linear layers whose epilogue does what comes next: requantization, with GELU or without, or the residual add."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import gelu, reference_to_int8, to_int8

MULTIPROCESSORS = 132  # of an H100 or H200
GROUP = 8  # rows of tiles that share the weight's tiles in the L2 cache


@triton.jit
def _tile(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and the first column of a program's tile."""
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    top = (program // (GROUP_M * across)) * GROUP_M
    height = tl.minimum(down - top, GROUP_M)
    within = program % (GROUP_M * across)
    return (top + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def _product(x_ptr, weight_ptr, scale_ptr, bias_ptr, first, n, M, N: tl.constexpr, K: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of x @ weight.T * scale + bias in float32: BLOCK_M rows from the first one, columns n.

    It gives values only. What places the tile comes from `_tile`, which sees no tensor: else Inductor, which follows
    pointers through the source, would believe that a store into the result writes to the inputs, and copy those first.
    """
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x_ptr += first.to(tl.int64) * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        in_x, in_weight = (first + m < M)[:, None], (n < N)[None, :]
        if K % BLOCK_K:
            in_x, in_weight = in_x & (start + k < K)[None, :], in_weight & (start + k < K)[:, None]
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :], mask=in_x, other=0)
        weight = tl.load(weight_ptr + n[None, :] * K + (start + k)[:, None], mask=in_weight, other=0)
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    return total.to(tl.float32) * scale[None, :] + bias[None, :]


@triton.jit
def _kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, inverse, M, N: tl.constexpr, K: tl.constexpr, GELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    first, column = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    y = _product(x_ptr, weight_ptr, scale_ptr, bias_ptr, first, n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
    out = out_ptr + first.to(tl.int64) * N + m[:, None] * N + n[None, :]
    if GELU:
        y = gelu(y) * tl.cast(inverse, tl.float32)
    if out_ptr.dtype.element_ty == tl.int8:
        y = to_int8(y)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(first + m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, shortcut_ptr, index_ptr, out_ptr, M, in_rows, out_rows,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    first, column = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    n = column + tl.arange(0, BLOCK_N)
    y = _product(x_ptr, weight_ptr, scale_ptr, bias_ptr, first, n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
    m = first + tl.arange(0, BLOCK_M)
    target = tl.load(index_ptr + m % in_rows, mask=m < M, other=-1)
    offset = ((m // in_rows).to(tl.int64) * out_rows + target)[:, None] * N + n[None, :]
    kept = (target >= 0)[:, None] & (n < N)[None, :]
    y += tl.load(shortcut_ptr + offset, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=kept)


def blocks(m: int, n: int, k: int) -> dict[str, int]:
    """Tiles, from a sweep at batch 64 on an H200 (docs/performance.md): within 3 % of the best ones over a Swin-T.

    Where the whole result is so small that large tiles would leave multiprocessors idle, as at batch 1, they are small.
    """
    if statically_known_true(m * n < MULTIPROCESSORS * 64 * 64):
        block_m, block_n = 32, 32
    else:
        block_m = 64 if statically_known_true(m < 4096) else 128
        block_n = 32 if n % 64 else 128 if n >= 1024 and k >= 384 else 64
    block_k = 64 if k % 128 == 64 else 128  # 96 is padded: one step of 128 is faster than three of 32
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**sizes, "GROUP_M": GROUP, "num_warps": 4, "num_stages": 2 if block_n == 32 and block_m > 32 else 3}


def programs(m: int, n: int, sizes: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"]),)


def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype, **act: Any) -> Tensor:
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    sizes = blocks(m, n, k)
    wrap_triton(_kernel)[programs(m, n, sizes)](x, weight, scale, bias, out, M=m, N=n, K=k, **act, **sizes)
    return out


@triton_op("qswin::linear_quantize", mutates_args={})
def linear_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """int8(x @ weight.T * scale + bias).

    Args:
        x: (M, K) int8.
        weight: (N, K) int8.
        scale: (N,) float32: the scale of x times that of each of the weight's rows, over that of the result.
        bias: (N,) float32, over the scale of the result.

    Returns:
        (M, N) int8.
    """
    return _linear(x, weight, scale, bias, torch.int8, inverse=1.0, GELU=False)


@triton_op("qswin::linear_gelu_quantize", mutates_args={})
def linear_gelu_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inverse: float) -> Tensor:
    """int8(GELU(x @ weight.T * scale + bias) * inverse), (M, N); inverse is 1 / the scale of the result."""
    return _linear(x, weight, scale, bias, torch.int8, inverse=inverse, GELU=True)


@triton_op("qswin::linear_float", mutates_args={})
def linear_float(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T * scale + bias of a dtype, (M, N)."""
    return _linear(x, weight, scale, bias, dtype, inverse=1.0, GELU=False)


@triton_op("qswin::linear_add", mutates_args={})
def linear_add(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, index: Tensor) -> Tensor:
    """shortcut + (x @ weight.T * scale + bias), whose rows go back to where `index` took them from.

    Args:
        x: (B * R, K) int8; weight: (N, K) int8; scale, bias: (N,) float32.
        shortcut: (B, L, N) float16 or float32.
        index: (R,) int32: the row of an image that each row of x belongs to, each of 0..L-1 once; -1 for padding.

    Returns:
        (B, L, N) of the shortcut's dtype.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty_like(shortcut)
    sizes = blocks(m, n, k)
    wrap_triton(_add_kernel)[programs(m, n, sizes)](
        x, weight, scale, bias, shortcut, index, out, m, index.shape[0], shortcut.shape[1], N=n, K=k, **sizes
    )
    return out


def reference_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T * scale + bias in plain torch: the integer sums are exact in float64."""
    return (x.double() @ weight.double().T).float() * scale + bias


@linear_quantize.register_kernel("cpu")
def reference_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`linear_quantize` in plain torch."""
    return reference_to_int8(reference_linear(x, weight, scale, bias))


@linear_gelu_quantize.register_kernel("cpu")
def reference_gelu_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inverse: float) -> Tensor:
    """`linear_gelu_quantize` in plain torch, GELU being exact."""
    return reference_to_int8(F.gelu(reference_linear(x, weight, scale, bias)) * inverse)


@linear_float.register_kernel("cpu")
def reference_float(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`linear_float` in plain torch."""
    return reference_linear(x, weight, scale, bias).to(dtype)


@linear_add.register_kernel("cpu")
def reference_add(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, index: Tensor) -> Tensor:
    """`linear_add` in plain torch."""
    y = reference_linear(x, weight, scale, bias).view(len(shortcut), len(index), -1)
    kept = index >= 0
    out = shortcut.float().clone()
    out[:, index[kept].long()] += y[:, kept]
    return out.to(shortcut.dtype)
