"""Block-wise reconstruction: each block is trained to give what the float model's gives, on calibration images alone.

Li et al., "BRECQ", ICLR 2021: block by block (section 3.2), with errors weighted by the Fisher information (section
3.3), so that what the prediction depends on counts most. Wei et al., "QDrop", ICLR 2022: the inputs are what the
quantized blocks before it leave, and in training each element of an activation stays in float with probability 1/2
(section 3.3), so that the block does not fit the calibration images alone. Weights and ranges are trained by QAT's
gradients instead of a rounding variable. No labels.
"""

import copy
import dataclasses
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qswin.qat.ptq.fisher import fisher_weights
from qswin.qat.quant.blocks import Arguments, block_arguments, block_output, blocks
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.rewrite import disable

KEEP_FLOAT = 0.5  # as in QDrop


@dataclasses.dataclass(frozen=True)
class _Example:
    """One batch as a block sees it: its arguments in the quantized model, and the float block's output and weights."""

    arguments: Arguments
    target: Tensor
    weights: Tensor


def reconstruct(
    model: nn.Module, batches: Sequence[Tensor], steps: int, lr: float, range_lr: float, seed: int = 0
) -> list[float]:
    """Trains a calibrated model block by block, in place; its ranges are constants again afterwards.

    Args:
        model: gives logits or feature maps.
        batches: (N, 3, H, W) each, on the model's device; they take turns, one for each step.
        steps: of each block.
        lr: of weights and biases, Adam's, falling to 0 as a cosine.
        range_lr: of learned ranges, the relative change a step.
        seed: of the random numbers. Those of the caller go on as if nothing had been drawn.

    Returns:
        For each block, the weighted error left as a share of what it started with.

    Raises:
        ValueError: a block has no Fisher weights; see `fisher_weights`.
    """
    teacher = _float_copy(model)
    model.eval()
    shares = []
    pairs = list(zip(blocks(model), blocks(teacher), strict=True))
    with torch.random.fork_rng([batches[0].device] if batches[0].is_cuda else []):
        torch.manual_seed(seed)
        for block, original in tqdm(pairs, "reconstruct", disable=not sys.stderr.isatty()):
            weights = fisher_weights(teacher, original, batches)
            examples = [
                _Example(block_arguments(model, block, batch), block_output(teacher, original, batch), weight)
                for batch, weight in zip(batches, weights, strict=True)
            ]
            shares.append(_train(block, examples, steps, lr, range_lr))
    return shares


def _float_copy(model: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    disable(teacher, quiet=True)
    return teacher


def _train(block: nn.Module, examples: Sequence[_Example], steps: int, lr: float, range_lr: float) -> float:
    """Minimises the block's weighted squared error; returns the share of it that is left."""
    for quantizer in quantizers(block):
        quantizer.learn_range()
    before = _error(block, examples)
    ranges = [p for name, p in block.named_parameters() if name.endswith("_log_gain")]
    weights = [p for name, p in block.named_parameters() if not name.endswith("_log_gain")]
    optimizer = torch.optim.Adam([{"params": weights, "lr": lr}, {"params": ranges, "lr": range_lr}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for quantizer in quantizers(block):
        quantizer.train()  # LSQ's gradient scale; all else stays in evaluation mode, without dropout or drop path
        quantizer.keep_float = KEEP_FLOAT
    for step in range(steps):
        loss = _loss(block, examples[step % len(examples)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    block.eval()
    for quantizer in quantizers(block):
        quantizer.keep_float = 0.0
        quantizer.freeze_range()
    return _error(block, examples) / max(before, 1e-30)


def _loss(block: nn.Module, example: _Example) -> Tensor:
    return (example.weights * (block(*example.arguments) - example.target).square()).mean()


@torch.no_grad()
def _error(block: nn.Module, examples: Iterable[_Example]) -> float:
    return sum(_loss(block, example).item() for example in examples)
