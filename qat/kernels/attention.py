"""Window attention in INT8: both matmuls, position bias, mask and softmax of a window and head in one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from qat.kernels.rounding import reference_to_int8, to_int8


@triton.jit
def _kernel(
    qkv_ptr, bias_ptr, out_ptr, masks, heads, channels, qk_scale, probs_inverse, av_scale,
    TOKENS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    window, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, depth = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    real = token < TOKENS
    rows = qkv_ptr + (window * TOKENS + token)[:, None] * (3 * channels) + head * HEAD + depth[None, :]
    q = tl.load(rows, mask=real[:, None], other=0)
    k = tl.load(rows + channels, mask=real[:, None], other=0)
    v = tl.load(rows + 2 * channels, mask=real[:, None], other=0)
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * qk_scale
    square = bias_ptr + ((window % masks) * heads + head) * TOKENS * TOKENS + token[:, None] * TOKENS + token[None, :]
    scores += tl.load(square, mask=real[:, None] & real[None, :], other=0.0).to(tl.float32)
    scores = tl.where(real[None, :], scores, -float("inf"))
    probs = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    values = tl.dot(to_int8(probs * probs_inverse), v, out_dtype=tl.int32).to(tl.float32) * av_scale
    out = out_ptr + (window * TOKENS + token)[:, None] * channels + head * HEAD + depth[None, :]
    tl.store(out, to_int8(values), mask=real[:, None])


@triton_op("qswin::window_attention", mutates_args={})
def window_attention(qkv: Tensor, bias: Tensor, qk_scale: float, probs_inverse: float, av_scale: float) -> Tensor:
    """int8(int8(softmax(q k^T * qk_scale + bias) * probs_inverse) v * av_scale).

    Args:
        qkv: (W * N, 3 * heads * D) int8: q, k, v beside each other, heads within each, N tokens a window.
        bias: (M, heads, N, N), float16 or float32: position bias plus mask of window w in row w % M.
        qk_scale: the scale of q times that of k.
        probs_inverse: 1 / the scale of the probabilities.
        av_scale: the scale of the probabilities times that of v, over that of the result.

    Returns:
        (W * N, heads * D) int8.
    """
    masks, heads, tokens, _ = bias.shape
    rows, channels = qkv.shape[0], qkv.shape[1] // 3  # len() would make a constant of a free batch
    out = torch.empty((rows, channels), dtype=torch.int8, device=qkv.device)
    wrap_triton(_kernel)[(rows // tokens, heads)](
        qkv, bias, out, masks, heads, channels, qk_scale, probs_inverse, av_scale,
        TOKENS=tokens, HEAD=channels // heads, BLOCK=max(32, triton.next_power_of_2(tokens)), num_warps=4,
    )  # fmt: skip
    return out


@window_attention.register_kernel("cpu")
def reference(qkv: Tensor, bias: Tensor, qk_scale: float, probs_inverse: float, av_scale: float) -> Tensor:
    """`window_attention` in plain torch: the integer sums are exact in float64."""
    masks, heads, tokens, _ = bias.shape
    q, k, v = qkv.double().view(-1, tokens, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = ((q @ k.transpose(-2, -1)).float() * qk_scale).view(-1, *bias.shape) + bias.float()
    probs = reference_to_int8(scores.softmax(-1) * probs_inverse).double().view(-1, heads, tokens, tokens)
    values = (probs @ v).float() * av_scale
    return reference_to_int8(values).transpose(1, 2).flatten(2).flatten(0, 1)
