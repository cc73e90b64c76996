"""Weights that oscillate between two levels while they are trained: how many do, and freezing those that do so often.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, sections 2.3 and 4.2 (algorithm 1).
"""

import torch
from torch import Tensor, nn

from qswin.qat.quant.layers import weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer

MOMENTUM = 0.01  # of the running means, as in the paper's experiments
OSCILLATING = 0.005  # the frequency from which the paper calls a weight oscillating


def levels(quantizer: TensorQuantizer, weight: Tensor) -> Tensor:
    """The levels that a weight is rounded to, of the weight's shape."""
    return quantizer.spec.grid.nearest(weight / quantizer.scale)


class _Weight(nn.Module):
    """What is known of one weight tensor; all of its shape."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("level", start.to(torch.int8))
        self.register_buffer("direction", torch.zeros_like(start, dtype=torch.int8))  # of the last change
        self.register_buffer("frequency", torch.zeros_like(start))  # running mean of: this step changed back
        self.register_buffer("mean", start.clone())  # running mean of the level; where frozen, the level
        self.register_buffer("frozen", torch.zeros_like(start, dtype=torch.bool))
        self.level: Tensor
        self.direction: Tensor
        self.frequency: Tensor
        self.mean: Tensor
        self.frozen: Tensor

    def count(self, now: Tensor) -> None:
        change = now.sub(self.level).sign_().to(torch.int8)
        self.frequency.lerp_((change * self.direction < 0).float(), MOMENTUM)
        self.direction = torch.where(change != 0, change, self.direction)
        self.mean = torch.where(self.frozen, self.mean, self.mean.lerp(now, MOMENTUM))
        self.level = now.to(torch.int8)

    def freeze(self, threshold: float) -> None:
        new = (self.frequency > threshold) & ~self.frozen
        self.mean = torch.where(new, self.mean.round(), self.mean)
        self.frozen |= new


class Oscillations(nn.Module):
    """Counts the oscillations of a calibrated model's quantized weights, and freezes the weights that pass a frequency.

    A weight oscillates at a step that takes it back to where its last change of level came from. A frozen one stays at
    the level that it was at most of the time. All state is in buffers, so that a run which is killed goes on alike.

    Args:
        threshold: oscillations a step, a running mean; 1 freezes nothing.

    Raises:
        ValueError: the threshold is not from 0 to 1, or no weight of the model is quantized.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"train.freeze_oscillating={threshold} is not a frequency; give 0 to 1")
        if not weight_quantizers(model):
            raise ValueError("train.freeze_oscillating is set, but no weight is quantized; leave it out")
        self.threshold, self.pairs = threshold, tuple(weight_quantizers(model))
        with torch.no_grad():
            self.known = tuple(_Weight(levels(quantizer, weight)) for quantizer, weight in self.pairs)
        self.weights = nn.ModuleList(self.known)  # for state_dict

    @torch.no_grad()
    def update(self) -> None:
        """After each step of the optimizer."""
        for known, (quantizer, weight) in zip(self.known, self.pairs, strict=True):
            known.count(levels(quantizer, weight))
            known.freeze(self.threshold)
            weight.copy_(torch.where(known.frozen, known.mean * quantizer.scale, weight))

    def shares(self) -> dict[str, float]:
        """{"oscillating", "frozen"}: shares of all quantized weights."""
        total = sum(known.frozen.numel() for known in self.known)
        oscillating = sum(int((known.frequency > OSCILLATING).sum()) for known in self.known)
        return {
            "oscillating": oscillating / total,
            "frozen": sum(int(known.frozen.sum()) for known in self.known) / total,
        }
