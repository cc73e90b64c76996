"""Window attention in INT8: both matmuls, position bias, mask and softmax of a few windows and a head in one program."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from qat.kernels.arithmetic import reference_to_int8, to_int8

LOG2E = tl.constexpr(1.4426950408889634)
WINDOWS = 4  # that a program takes, so that it reads their bias once
FEW = 2048  # programs, below which each takes one window


@triton.jit
def _kernel(
    qkv_ptr, bias_ptr, out_ptr, windows, masks, heads, qk_scale, probs_inverse, av_scale,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Windows that share a mask, in one head. Softmax is computed in powers of two."""
    place, head = tl.program_id(0) // heads, tl.program_id(0) % heads  # the window's place in its image
    token, depth = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    real = (token < TOKENS)[:, None]
    square = bias_ptr + (place * heads + head) * BLOCK * BLOCK + token[:, None] * BLOCK + token[None, :]
    bias = tl.load(square).to(tl.float32) * LOG2E
    inside = token[:, None] * CHANNELS + head * HEAD + depth[None, :]
    for step in range(WINDOWS):
        window = (tl.program_id(1) * WINDOWS + step) * masks + place
        if window < windows:
            rows = window.to(tl.int64) * TOKENS * CHANNELS
            qkv = qkv_ptr + 3 * rows + inside + token[:, None] * (2 * CHANNELS)
            q = tl.load(qkv, mask=real, other=0)
            k = tl.load(qkv + CHANNELS, mask=real, other=0)
            v = tl.load(qkv + 2 * CHANNELS, mask=real, other=0)
            scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * (qk_scale * LOG2E) + bias
            probs = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
            levels = to_int8(probs * (probs_inverse / tl.sum(probs, axis=1))[:, None])
            values = tl.dot(levels, v, out_dtype=tl.int32).to(tl.float32) * av_scale
            tl.store(out_ptr + rows + inside, to_int8(values), mask=real)


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(
    qkv: Tensor, bias: Tensor, tokens: int, qk_scale: float, probs_inverse: float, av_scale: float
) -> Tensor:
    """int8(int8(softmax(q k^T * qk_scale + bias) * probs_inverse) v * av_scale).

    Args:
        qkv: (W * N, 3 * heads * D) int8: q, k, v beside each other, heads within each, N tokens a window.
        bias: (M, heads, P, P), float16 or float32, as `padded_bias` gives it: position bias plus mask of window w in row
            w % M.
        tokens: N.
        qk_scale: the scale of q times that of k.
        probs_inverse: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.

    Returns:
        (W * N, heads * D) int8.
    """
    masks, heads, block, _ = bias.shape
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=torch.int8, device=qkv.device)
    windows = rows // tokens
    each = 1 if statically_known_true(windows * heads < FEW) else WINDOWS
    wrap_triton(_kernel)[(masks * heads, triton.cdiv(windows, masks * each))](
        qkv, bias, out, windows, masks, heads, qk_scale, probs_inverse, av_scale,
        TOKENS=tokens, CHANNELS=channels, HEAD=channels // heads, BLOCK=block, WINDOWS=each, num_warps=4,
    )  # fmt: skip
    return out


def padded_bias(bias: Tensor) -> Tensor:
    """(M, heads, N, N) with rows and columns up to the size of a tile; no token attends to the new ones."""
    extra = max(32, triton.next_power_of_2(bias.shape[-1])) - bias.shape[-1]
    return F.pad(F.pad(bias, (0, extra), value=-float("inf")), (0, 0, 0, extra)).contiguous()


@window_attention.register_kernel("cpu")
def reference(qkv: Tensor, bias: Tensor, tokens: int, qk_scale: float, probs_inverse: float, av_scale: float) -> Tensor:
    """`window_attention` in plain torch: the integer sums are exact in float64."""
    heads, bias = bias.shape[1], bias[:, :, :tokens, :tokens].float()
    q, k, v = qkv.double().view(-1, tokens, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = ((q @ k.transpose(-2, -1)).float() * qk_scale).view(-1, *bias.shape) + bias
    probs = reference_to_int8(scores.softmax(-1) * probs_inverse).double().view(-1, heads, tokens, tokens)
    values = (probs @ v).float() * av_scale
    return reference_to_int8(values).transpose(1, 2).flatten(2).flatten(0, 1)
