"""Block-wise reconstruction: each block is trained to give what the float model's gives, on calibration images alone.

Li et al., "BRECQ", ICLR 2021, section 3.2, with the inputs that the quantized blocks before it leave (as in Wei et al.,
"QDrop", ICLR 2022), and with weights and ranges trained by QAT's gradients instead of a rounding variable. No labels.
"""

import copy
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qswin.qat.quant.blocks import Arguments, block_arguments, block_output, blocks
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.rewrite import disable


def reconstruct(model: nn.Module, batches: Sequence[Tensor], steps: int, lr: float, range_lr: float) -> list[float]:
    """Trains a calibrated model block by block, in place; its ranges are constants again afterwards.

    Args:
        batches: (N, 3, H, W) each, on the model's device; one is drawn for each step.
        steps: of each block.
        lr: of weights and biases, Adam's, falling to 0 as a cosine.
        range_lr: of learned ranges, the relative change a step.

    Returns:
        For each block, the error left as a share of the error it started with.
    """
    teacher = copy.deepcopy(model).eval()
    disable(teacher, quiet=True)
    model.eval()
    shares = []
    pairs = list(zip(blocks(model), blocks(teacher), strict=True))
    for block, original in tqdm(pairs, "reconstruct", disable=not sys.stderr.isatty()):
        inputs = [block_arguments(model, block, batch) for batch in batches]
        targets = [block_output(teacher, original, batch) for batch in batches]
        shares.append(_train(block, inputs, targets, steps, lr, range_lr))
    return shares


def _train(
    block: nn.Module, inputs: list[Arguments], targets: list[Tensor], steps: int, lr: float, range_lr: float
) -> float:
    """Minimises the block's squared error; returns the share of it that is left."""
    for quantizer in quantizers(block):
        quantizer.learn_range()
    before = _error(block, inputs, targets)
    ranges = [p for name, p in block.named_parameters() if name.endswith("_log_gain")]
    weights = [p for name, p in block.named_parameters() if not name.endswith("_log_gain")]
    optimizer = torch.optim.Adam([{"params": weights, "lr": lr}, {"params": ranges, "lr": range_lr}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for quantizer in quantizers(block):
        quantizer.train()  # LSQ's gradient scale; all else stays in evaluation mode, without dropout or drop path
    for step in range(steps):
        index = step % len(inputs)
        loss = F.mse_loss(block(*inputs[index]), targets[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    block.eval()
    for quantizer in quantizers(block):
        quantizer.freeze_range()
    return _error(block, inputs, targets) / max(before, 1e-30)


@torch.no_grad()
def _error(block: nn.Module, inputs: Iterable[Arguments], targets: Iterable[Tensor]) -> float:
    return sum(F.mse_loss(block(*args), target).item() for args, target in zip(inputs, targets, strict=True))
