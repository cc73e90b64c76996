"""Linear layers in INT8 or FP8 whose epilogue does what comes next: requantization, after GELU or not, or an add."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qswin.qat.kernels.arithmetic import gelu, to_levels, to_levels_reference
from qswin.qat.kernels.launch import Launch, plans

MULTIPROCESSORS = 132  # of an H100 or H200, on which the tiles were chosen
MAX_WALK_K = 256  # columns of x that a program holds for a walk over the weight's rows
SMALLEST_SQUARE = tl.constexpr(1e-24)  # of a length: F.normalize's 1e-12, squared


@triton.jit
def _pid_m_n(N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row and the column of a program's tile: all tiles of some rows come one after another.

    They read the same rows of x, and all of the weight, which the L2 cache holds.
    """
    return tl.program_id(0) // tl.cdiv(N, BLOCK_N), tl.program_id(0) % tl.cdiv(N, BLOCK_N)


@triton.jit
def _load_columns(ptrs, offs_k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns offs_k of some rows, (rows, BLOCK_K), zeros behind K."""
    return tl.load(ptrs) if K % BLOCK_K == 0 else tl.load(ptrs, mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def _dequantize(acc, scale_ptr, bias_ptr, cols):
    """Sums of levels as floats."""
    return acc.to(tl.float32) * tl.load(scale_ptr + cols)[None, :] + tl.load(bias_ptr + cols)[None, :]


@triton.jit
def _matmul_tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, start_m, offs_n, M, N: tl.constexpr, K: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A tile of x @ weight.T * scale + bias in float32: BLOCK_M rows from start_m, columns offs_n.

    Behind the last row and column the last one is read again, which costs less than a mask; its result is not stored.

    It returns values only; offsets come from `_pid_m_n`, which takes no pointer. Inductor follows pointers through
    helpers: if offsets came from one that takes pointers, it would believe that a store to those offsets writes to the
    inputs, and would copy the inputs before each call.
    """
    offs_k = tl.arange(0, BLOCK_K)
    rows, cols = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - start_m), tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + start_m.to(tl.int64) * K + rows[:, None] * K + offs_k[None, :]
    weight_ptrs = weight_ptr + cols[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start_k in range(0, K, BLOCK_K):
        x = _load_columns(x_ptrs + start_k, start_k + offs_k, K, BLOCK_K)
        weight = _load_columns(weight_ptrs + start_k, start_k + offs_k, K, BLOCK_K)
        acc = tl.dot(x, tl.trans(weight), acc, out_dtype=acc.dtype)
    return _dequantize(acc, scale_ptr, bias_ptr, cols)


@triton.jit
def _normalize_heads(y, start_n, NORMALIZED: tl.constexpr, HEAD_DIM: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of y in which each HEAD_DIM columns of a row, up to column NORMALIZED, have length 1; zeros stay."""
    y = tl.reshape(y, (BLOCK_M, BLOCK_N // HEAD_DIM, HEAD_DIM))
    inv_length = tl.rsqrt(tl.maximum(tl.sum(y * y, axis=2), SMALLEST_SQUARE))
    starts = start_n + HEAD_DIM * tl.arange(0, BLOCK_N // HEAD_DIM)
    y *= tl.where((starts < NORMALIZED)[None, :], inv_length, 1.0)[:, :, None]
    return tl.reshape(y, (BLOCK_M, BLOCK_N))


@triton.jit
def _epilogue(y, inv_scale_ptr, start_n, cols, GELU: tl.constexpr, NORMALIZED: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """What comes behind a linear layer, times inv_scale; or y as it is."""
    if GELU:
        y = gelu(y, tl.load(inv_scale_ptr + cols)[None, :])
    if NORMALIZED:
        y = _normalize_heads(y, start_n, NORMALIZED, HEAD_DIM, BLOCK_M, BLOCK_N)
        y *= tl.load(inv_scale_ptr + cols)[None, :]
    return y


@triton.jit
def _stored(y, LEVEL: tl.constexpr, OUT: tl.constexpr):
    """y as levels, or as floats of another dtype."""
    return to_levels(y, OUT) if OUT == LEVEL else y.to(OUT)


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, inv_scale_ptr, out_ptr, M, N: tl.constexpr, K: tl.constexpr,
    GELU: tl.constexpr, NORMALIZED: tl.constexpr, HEAD_DIM: tl.constexpr, WALK_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the result; or, with WALK_STAGES, all columns of some rows, tile by tile, x being read once.

    K is one step then, and WALK_STAGES is how many tiles of the weight are on their way, as Triton counts them.
    """
    LEVEL: tl.constexpr = x_ptr.dtype.element_ty
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    offs_m = tl.arange(0, BLOCK_M)
    if WALK_STAGES:
        start_m = tl.program_id(0) * BLOCK_M
        offs_k = tl.arange(0, BLOCK_K)
        rows = tl.minimum(offs_m, M - 1 - start_m)
        x_ptrs = x_ptr + start_m.to(tl.int64) * K + rows[:, None] * K + offs_k[None, :]
        x = _load_columns(x_ptrs, offs_k, K, BLOCK_K)
        for start_n in tl.range(0, N, BLOCK_N, num_stages=WALK_STAGES):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            cols = tl.minimum(offs_n, N - 1)
            weight = _load_columns(weight_ptr + cols[:, None] * K + offs_k[None, :], offs_k, K, BLOCK_K)
            acc = tl.dot(x, tl.trans(weight), out_dtype=tl.int32 if LEVEL == tl.int8 else tl.float32)
            y = _dequantize(acc, scale_ptr, bias_ptr, cols)
            y = _epilogue(y, inv_scale_ptr, start_n, cols, GELU, NORMALIZED, HEAD_DIM, BLOCK_M, BLOCK_N)
            out_ptrs = out_ptr + start_m.to(tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
            tl.store(out_ptrs, _stored(y, LEVEL, OUT), mask=(start_m + offs_m < M)[:, None] & (offs_n < N)[None, :])
    else:
        pid_m, pid_n = _pid_m_n(N, BLOCK_N)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        y = _matmul_tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, start_m, offs_n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
        cols = tl.minimum(offs_n, N - 1)
        y = _epilogue(y, inv_scale_ptr, start_n, cols, GELU, NORMALIZED, HEAD_DIM, BLOCK_M, BLOCK_N)
        out_ptrs = out_ptr + start_m.to(tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
        tl.store(out_ptrs, _stored(y, LEVEL, OUT), mask=(start_m + offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _linear_add_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, shortcut_ptr, token_ids_ptr, out_ptr, M,
    ROWS_PER_IMAGE: tl.constexpr, NUM_TOKENS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = _pid_m_n(N, BLOCK_N)
    start_m = pid_m * BLOCK_M
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _matmul_tile(x_ptr, weight_ptr, scale_ptr, bias_ptr, start_m, offs_n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    token_ids = tl.load(token_ids_ptr + offs_m % ROWS_PER_IMAGE, mask=offs_m < M, other=-1)
    offsets = ((offs_m // ROWS_PER_IMAGE).to(tl.int64) * NUM_TOKENS + token_ids)[:, None] * N + offs_n[None, :]
    mask = (token_ids >= 0)[:, None] & (offs_n < N)[None, :]
    y += tl.load(shortcut_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def tile_config(m: int, n: int, k: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and warps and stages, from a sweep at batch 64 on an H200 (docs/performance.md).

    Where the result is so small that large tiles would leave multiprocessors idle, as at batch 1, tiles are small.
    """
    if statically_known_true(m * n < MULTIPROCESSORS * 64 * 64):
        block_m, block_n = 32, 32
    else:
        block_m = 64 if statically_known_true(m < 4096) else 128
        block_n = 32 if n % 64 else 128 if n >= 1024 and k >= 384 else 64
    block_k = 64 if k % 128 == 64 else 128  # 96 is padded: a step of 128 is as fast as 64 + 32, and faster at batch 1
    num_stages = 2 if block_n == 32 and block_m > 32 else 3
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, {"num_warps": 4, "num_stages": num_stages}


def walk_config(m: int, n: int, k: int) -> tuple[dict[str, int], dict[str, int]] | None:
    """Block sizes and stages of a walk over all columns; None where it does not pay: for few rows, or a large K.

    At batch 64 it takes 41 us for qkv of a Swin-T's first stage, 57 for fc1, where tiles take 52 and 76: they are bound
    by the L1 cache, through which each tile of columns reads x again.
    """
    block_k = max(32, triton.next_power_of_2(k))
    if block_k > MAX_WALK_K or statically_known_true(m < 2 * MULTIPROCESSORS * 128):
        return None
    block_n = 32 if n % 64 else 64
    block_sizes = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return block_sizes | {"WALK_STAGES": 3 if block_n == 32 else 2}, {"num_warps": 4}


def grid(m: int, n: int, block_sizes: dict[str, int]) -> tuple[int]:
    """A program for each tile of an (m, n) result."""
    return (triton.cdiv(m, block_sizes["BLOCK_M"]) * triton.cdiv(n, block_sizes["BLOCK_N"]),)


def _plan(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    inv_scale: Tensor | None = None,
    gelu: bool = False,
    normalized: int = 0,
    head_dim: int = 0,
) -> Launch:
    (m, k), n = x.shape, len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    walk = walk_config(m, n, k)
    block_sizes, options = walk or tile_config(m, n, k)
    block_sizes["BLOCK_N"] = max(block_sizes["BLOCK_N"], head_dim)
    pointers = {"x_ptr": x, "weight_ptr": weight, "scale_ptr": scale, "bias_ptr": bias}
    pointers |= {"inv_scale_ptr": scale if inv_scale is None else inv_scale, "out_ptr": out}
    epilogue = {"GELU": gelu, "NORMALIZED": normalized, "HEAD_DIM": head_dim, "WALK_STAGES": 0}
    arguments = {**pointers, "M": m, "N": n, "K": k, **epilogue, **block_sizes}
    programs = (triton.cdiv(m, block_sizes["BLOCK_M"]),) if walk else grid(m, n, block_sizes)
    return Launch(_linear_kernel, programs, arguments, options, out)


def _run(launch: Launch) -> Tensor:
    wrap_triton(_linear_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


@plans("qswin::linear_quantize")
def _plan_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Launch:
    return _plan(x, weight, scale, bias, x.dtype)


@triton_op("qswin::linear_quantize", mutates_args={})
def linear_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The levels, in the format of x, nearest to x @ weight.T * scale + bias.

    Args:
        x: (M, K) int8 or float8_e4m3fn.
        weight: (N, K) of the same dtype.
        scale: (N,) float32: the scale of x times that of each of the weight's rows, over that of the result.
        bias: (N,) float32, over the scale of the result.

    Returns:
        (M, N) of x's dtype.
    """
    return _run(_plan_quantize(x, weight, scale, bias))


@plans("qswin::linear_gelu_quantize")
def _plan_gelu_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor) -> Launch:
    return _plan(x, weight, scale, bias, x.dtype, inv_scale, gelu=True)


@triton_op("qswin::linear_gelu_quantize", mutates_args={})
def linear_gelu_quantize(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor) -> Tensor:
    """The levels, in the format of x, nearest to GELU(x @ weight.T * scale + bias) * inv_scale, (M, N).

    The arguments are those of `linear_quantize`, but scale and bias are not over the scale of the result. inv_scale,
    (N,) float32, is what each channel is multiplied by: 1 / that scale, times the channel's own scale where the next
    layer has one.
    """
    return _run(_plan_gelu_quantize(x, weight, scale, bias, inv_scale))


@plans("qswin::linear_cosine_quantize")
def _plan_cosine_quantize(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor, head_dim: int
) -> Launch:
    normalized = len(weight) // 3 * 2
    return _plan(x, weight, scale, bias, x.dtype, inv_scale, normalized=normalized, head_dim=head_dim)


@triton_op("qswin::linear_cosine_quantize", mutates_args={})
def linear_cosine_quantize(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor, head_dim: int
) -> Tensor:
    """The levels, in the format of x, of q / ||q||, k / ||k|| and v, times inv_scale: (M, N).

    q, k and v are a third each of the columns of x @ weight.T * scale + bias, and head_dim, a power of two of at least
    32, the columns that a head has of each. The other arguments are those of `linear_gelu_quantize`.
    """
    return _run(_plan_cosine_quantize(x, weight, scale, bias, inv_scale, head_dim))


@plans("qswin::linear_float")
def _plan_float(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Launch:
    return _plan(x, weight, scale, bias, dtype)


@triton_op("qswin::linear_float", mutates_args={})
def linear_float(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T * scale + bias, (M, N) of a dtype; scale is that of x times that of each of the weight's rows."""
    return _run(_plan_float(x, weight, scale, bias, dtype))


@plans("qswin::linear_add")
def _plan_add(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, token_ids: Tensor) -> Launch:
    (m, k), n = x.shape, len(weight)
    out = torch.empty_like(shortcut)
    block_sizes, options = tile_config(m, n, k)
    pointers = {"x_ptr": x, "weight_ptr": weight, "scale_ptr": scale, "bias_ptr": bias}
    pointers |= {"shortcut_ptr": shortcut, "token_ids_ptr": token_ids, "out_ptr": out}
    sizes = {"M": m, "ROWS_PER_IMAGE": token_ids.shape[0], "NUM_TOKENS": shortcut.shape[1], "N": n, "K": k}
    arguments = {**pointers, **sizes, **block_sizes}
    return Launch(_linear_add_kernel, grid(m, n, block_sizes), arguments, options, out)


@triton_op("qswin::linear_add", mutates_args={})
def linear_add(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, token_ids: Tensor) -> Tensor:
    """shortcut + (x @ weight.T * scale + bias), each row being added to its token.

    Args:
        x: (B * R, K) int8 or float8_e4m3fn; weight: (N, K) of the same; scale, bias: (N,) float32.
        shortcut: (B, L, N) float16 or float32.
        token_ids: (R,) int32: the token of an image, 0..L-1, that each of its R rows of x belongs to, each token once;
            -1 for a row of padding, which is dropped.

    Returns:
        (B, L, N) of the shortcut's dtype.
    """
    launch = _plan_add(x, weight, scale, bias, shortcut, token_ids)
    wrap_triton(_linear_add_kernel)[launch.grid](**launch.arguments, **launch.options)
    return launch.out


def _matmul_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T * scale + bias in plain torch: the sums are exact in float64."""
    return (x.double() @ weight.double().T).float() * scale + bias


@linear_quantize.register_kernel("cpu")
def linear_quantize_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`linear_quantize` in plain torch."""
    return to_levels_reference(_matmul_reference(x, weight, scale, bias), x.dtype)


@linear_gelu_quantize.register_kernel("cpu")
def linear_gelu_quantize_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor) -> Tensor:
    """`linear_gelu_quantize` in plain torch, GELU being exact."""
    return to_levels_reference(F.gelu(_matmul_reference(x, weight, scale, bias)) * inv_scale, x.dtype)


@linear_cosine_quantize.register_kernel("cpu")
def linear_cosine_quantize_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, inv_scale: Tensor, head_dim: int
) -> Tensor:
    """`linear_cosine_quantize` in plain torch."""
    q, k, v = _matmul_reference(x, weight, scale, bias).view(len(x), 3, -1, head_dim).unbind(1)
    y = torch.stack((F.normalize(q, dim=-1), F.normalize(k, dim=-1), v), dim=1).flatten(1)
    return to_levels_reference(y * inv_scale, x.dtype)


@linear_float.register_kernel("cpu")
def linear_float_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`linear_float` in plain torch."""
    return _matmul_reference(x, weight, scale, bias).to(dtype)


@linear_add.register_kernel("cpu")
def linear_add_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, shortcut: Tensor, token_ids: Tensor
) -> Tensor:
    """`linear_add` in plain torch."""
    y = _matmul_reference(x, weight, scale, bias).view(len(shortcut), len(token_ids), -1)
    mask = token_ids >= 0
    out = shortcut.float().clone()
    out[:, token_ids[mask].long()] += y[:, mask]
    return out.to(shortcut.dtype)
