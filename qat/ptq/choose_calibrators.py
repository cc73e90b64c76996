"""Each site's calibrator by what its range does to the block's output, not to the site's own values."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from qswin.qat.quant.blocks import Arguments, block_arguments, blocks
from qswin.qat.quant.layers import weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import disable, enable

CANDIDATES = ("max", "percentile:99.999", "percentile:99.99", "percentile:99.9", "mse", "entropy")


@torch.inference_mode()
def choose_calibrators(
    model: nn.Module, batches: Sequence[Tensor], candidates: Sequence[str] = CANDIDATES
) -> dict[str, str]:
    """Tries every calibrator at every activation of every block, alone, and keeps the range of least squared error.

    Args:
        model: calibrated, its histograms still there; its quantizers quantize afterwards.
        batches: (N, 3, H, W) each; the blocks see what the float model's see.

    Returns:
        {site: calibrator}; a site with a fixed range is left out, and so are those outside of blocks.
    """
    chosen: dict[str, str] = {}
    disable(model, quiet=True)
    for block in tqdm(blocks(model), "choose calibrators", disable=not sys.stderr.isatty()):
        inputs = [block_arguments(model, block, batch) for batch in batches]
        targets = [block(*arguments) for arguments in inputs]
        weights = {quantizer for quantizer, _ in weight_quantizers(block)}
        for quantizer in quantizers(block):
            if quantizer.spec.amax is None and quantizer not in weights:
                chosen[quantizer.site] = _choose(block, quantizer, inputs, targets, candidates)
    enable(model)
    return chosen


def _choose(
    block: nn.Module,
    quantizer: TensorQuantizer,
    inputs: list[Arguments],
    targets: list[Tensor],
    candidates: Sequence[str],
) -> str:
    """Leaves the quantizer with the best candidate's range, switched off. Equal errors go to the first."""

    def error(calibrator: str) -> float:
        quantizer.set_range_from_histogram(calibrator)
        quantizer.enable()
        return sum(F.mse_loss(block(*args), target).item() for args, target in zip(inputs, targets, strict=True))

    best = min(candidates, key=error)
    quantizer.set_range_from_histogram(best)
    quantizer.disable(quiet=True)
    return best
