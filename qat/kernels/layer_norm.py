"""LayerNorm of a tile, for the kernels that have one: before a quantization, a residual add, after patch embedding."""

import triton
import triton.language as tl


@triton.jit
def layer_norm(x, mask, weight, bias, eps, NUM_CHANNELS: tl.constexpr):
    """LayerNorm of each row of a float32 tile.

    It takes loaded values. A helper that loads weight and bias itself would load them once for each row of the tile.

    Args:
        x: (rows, channels), or (rows, tokens, channels) where several tokens' channels are one row; 0 where masked.
        mask: (1, channels) or (1, 1, channels): which channels exist.
        weight, bias: (1, channels) or (1, tokens, channels).
        NUM_CHANNELS: the length of a row, without masked channels.
    """
    centred = tl.where(mask, x - _row_sum(x) / NUM_CHANNELS, 0.0)
    variance = _row_sum(centred * centred) / NUM_CHANNELS
    return centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * weight + bias


@triton.jit
def _row_sum(x):
    """The sum of each row, (rows, 1) or (rows, 1, 1)."""
    total = tl.sum(x, axis=len(x.shape) - 1)
    if len(x.shape) == 3:
        total = tl.sum(total, axis=1)[:, None]
    return total[:, None]
