"""INT8 linear layers whose epilogue does what comes next: GELU and requantization, or the residual add."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qat.kernels.rounding import reference_to_int8, to_int8

GROUP = 8  # rows of tiles that share the weight's tiles in the L2 cache


@triton.jit
def _tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, M, N, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    """A tile of x @ weight.T * scale + bias in float32, with the rows and columns that it covers."""
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    first = (program // (GROUP_M * across)) * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    within = program % (GROUP_M * across)
    m = (first + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        in_x, in_weight = (m < M)[:, None], (n < N)[None, :]
        if K % BLOCK_K:
            in_x, in_weight = in_x & (start + k < K)[None, :], in_weight & (start + k < K)[:, None]
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :], mask=in_x, other=0)
        weight = tl.load(weight_ptr + n[None, :] * K + (start + k)[:, None], mask=in_weight, other=0)
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    return total.to(tl.float32) * scale[None, :] + bias[None, :], m, n


@triton.jit
def _quantize_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, inverse_ptr, out_ptr, M, N, K: tl.constexpr,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    y, m, n = _tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    y = y * tl.load(inverse_ptr + n, mask=n < N, other=0.0)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], to_int8(y), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _float_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, M, N, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    y, m, n = _tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    out = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, shortcut_ptr, index_ptr, out_ptr, M, N, in_rows, out_rows, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    y, m, n = _tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    target = tl.load(index_ptr + m % in_rows, mask=m < M, other=-1)
    offset = ((m // in_rows) * out_rows + target)[:, None] * N + n[None, :]
    kept = (target >= 0)[:, None] & (n < N)[None, :]
    y += tl.load(shortcut_ptr + offset, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=kept)


def _blocks(m: int, n: int, k: int) -> dict[str, int]:
    """Tiles: those that divide the widths of Swin (96 times a power of two), and smaller ones for rows known to be few."""
    block_m = 64 if statically_known_true(m < 128 * 132) else 128
    block_n = next(size for size in (128, 64, 32) if n % size == 0 or size == 32)
    block_k = next(size for size in (128, 64, 32) if k % size == 0 or size == 32)
    warps = 8 if block_m == block_n == 128 else 4
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": GROUP,
        "num_warps": warps,
        "num_stages": 3,
    }


def _programs(m: int, n: int, blocks: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(n, blocks["BLOCK_N"]),)


@triton_op("qswin::linear_quantize", mutates_args={})
def linear_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inverse: Tensor, gelu: bool) -> Tensor:
    """int8(act(x @ weight.T * scale + bias) * inverse), act being exact GELU or nothing.

    Args:
        x: (M, K) int8.
        weight: (N, K) int8.
        scale: (N,) float32: the scale of x times that of each of the weight's rows.
        bias: (N,) float32.
        inverse: (N,) float32: 1 / the scale of each column of the result.

    Returns:
        (M, N) int8.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=torch.int8, device=x.device)
    blocks = _blocks(m, n, k)
    wrap_triton(_quantize_kernel)[_programs(m, n, blocks)](
        x, weight, scale, bias, inverse, out, m, n, K=k, GELU=gelu, **blocks
    )
    return out


@triton_op("qswin::linear_float", mutates_args={})
def linear_float(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T * scale + bias of a dtype, (M, N); the arguments are those of `linear_quantize`."""
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    blocks = _blocks(m, n, k)
    wrap_triton(_float_kernel)[_programs(m, n, blocks)](x, weight, scale, bias, out, m, n, K=k, **blocks)
    return out


@triton_op("qswin::linear_add", mutates_args={})
def linear_add(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, index: Tensor) -> Tensor:
    """shortcut + (x @ weight.T * scale + bias), whose rows go back to where `index` took them from.

    Args:
        x: (B * R, K) int8; weight: (N, K) int8; scale, bias: (N,) float32, as of `linear_quantize`.
        shortcut: (B, L, N) float16 or float32.
        index: (R,) int32: the row of an image that each row of x belongs to, each of 0..L-1 once; -1 for padding.

    Returns:
        (B, L, N) of the shortcut's dtype.
    """
    (m, k), n = x.shape, len(weight)
    out = torch.empty_like(shortcut)
    blocks = _blocks(m, n, k)
    wrap_triton(_add_kernel)[_programs(m, n, blocks)](
        x, weight, scale, bias, shortcut, index, out, m, n, len(index), shortcut.shape[1], K=k, **blocks
    )
    return out


def reference_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T * scale + bias in plain torch: the integer sums are exact in float64."""
    return (x.double() @ weight.double().T).float() * scale + bias


@linear_quantize.register_kernel("cpu")
def reference_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inverse: Tensor, gelu: bool) -> Tensor:
    """`linear_quantize` in plain torch."""
    y = reference_linear(x, weight, scale, bias)
    return reference_to_int8((F.gelu(y) if gelu else y) * inverse)


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
