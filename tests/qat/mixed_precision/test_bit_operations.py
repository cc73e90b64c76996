"""Bit operations against counts by hand."""

import torch

from qswin.qat.mixed_precision.bit_operations import bit_operations
from qswin.qat.mixed_precision.probe import group_quantizers
from qswin.qat.quant.rewrite import enable


def test_bit_operations_are_counted_by_hand(quantized):
    """One image, 32x32, patches of 2: 256 tokens of 16 channels in windows of 16."""
    enable(quantized)
    operations = bit_operations(quantized, torch.randn(1, 3, 32, 32))
    qkv = 256 * 16 * 48
    assert operations["layers.0.blocks.0.attn.qkv"] == (qkv * 64, qkv * 256)
    qk = 16 * 2 * 16 * 16 * 8  # windows, heads, tokens, tokens, channels of a head
    assert operations["layers.0.blocks.0.attn.q"] == (qk / 2 * 64, qk / 2 * 256)
    assert operations["layers.0.blocks.0.add1.shortcut"] == (256 * 16 * 8, 256 * 16 * 16)
    assert operations["patch_embed"] == (256 * 16 * 12 * 64, 256 * 16 * 12 * 256)
    assert set(operations) == set(group_quantizers(quantized, "site"))
