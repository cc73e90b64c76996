"""Scale migration from activations into weights (Xiao et al., "SmoothQuant", ICML 2023, section 4).

A normalization's weight and bias are divided by a factor for each channel, and the columns of the linears that read it are
multiplied by it: the model computes the same, no operation is added, and channels with outliers no longer set the range of
all. For the output of attention the factor goes from the rows of v into the columns of proj.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.rewrite import disable


def smooth(model: nn.Module, batches: Iterable[Tensor], alpha: float = 0.5) -> int:
    """Smooths every pair of a rewritten model that is not calibrated yet; its quantizers are off afterwards.

    Args:
        batches: (N, 3, H, W) on the model's device.
        alpha: how much of an activation's range moves into the weights, 0 to 1: s = amax(x)^alpha / amax(w)^(1 - alpha).

    Returns:
        The number of pairs.
    """
    pairs = smooth_pairs(model)
    disable(model)
    peaks = channel_peaks(model, [linears[0] for _, linears in pairs], batches)
    for (norm, linears), peak in zip(pairs, peaks, strict=True):
        columns = torch.stack([linear.weight.detach().abs().amax(0) for linear in linears]).amax(0)
        scale = peak.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)
        norm.weight.data /= scale
        norm.bias.data /= scale
        for linear in linears:
            linear.weight.data *= scale
    return len(pairs)


def smooth_pairs(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """(normalization, the linears that alone read it), as the twins name them in `SMOOTHED`."""
    return [
        (owner.get_submodule(norm), [owner.get_submodule(name) for name in linears])
        for owner in model.modules()
        for norm, linears in getattr(owner, "SMOOTHED", ())
    ]


@torch.inference_mode()
def channel_peaks(model: nn.Module, layers: list[nn.Module], batches: Iterable[Tensor]) -> list[Tensor]:
    """The largest magnitude in each channel of each layer's input: (C,) each."""
    peaks: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        peak = inputs[0].abs().flatten(0, -2).amax(0)
        peaks[layer] = torch.maximum(peaks[layer], peak) if layer in peaks else peak

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [peaks[layer].clone() for layer in layers]
