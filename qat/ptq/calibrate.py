"""Post-training quantization: ranges from a pass over some images. The command `qswin calibrate`."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qswin.calib.calibrators import Histogram
from qswin.calib.histogram_file import Observation
from qswin.qat.quant.layers import weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import enable


def calibrate(model: nn.Module, batches: Iterable[Tensor], dead_range: float | None = None) -> int:
    """Calibrates every quantizer of a rewritten model in one pass and switches them on.

    Under torch.distributed each rank passes its own batches, and all end with the ranges of the whole.

    Args:
        batches: (N, 3, H, W) on the model's device.
        dead_range: stands in for ranges that come out as 0.

    Returns:
        The number of images seen by this rank.

    Raises:
        ValueError: there were no images, or a range is dead and `dead_range` is None; the site is named.
    """
    activations = activation_quantizers(model)
    for quantizer in activations:
        quantizer.observe()
    images = 0
    with torch.inference_mode():
        for batch in batches:
            model(batch)
            images += len(batch)
    merge_ranks(activations)
    if not images:
        raise ValueError("calibration saw 0 images; raise calibration.images or check data.root")
    set_ranges(model, dead_range=dead_range)
    enable(model)
    return images


def activation_quantizers(model: nn.Module) -> list[TensorQuantizer]:
    """The quantizers of a model apart from its weights'."""
    weights = {quantizer for quantizer, _ in weight_quantizers(model)}
    return [quantizer for quantizer in quantizers(model) if quantizer not in weights]


def set_ranges(model: nn.Module, calibrator: str | None = None, dead_range: float | None = None) -> None:
    """Takes all ranges from what a pass has left in the histograms; may be called again with another calibrator.

    Args:
        calibrator: over each site's own.

    Raises:
        ValueError: a site was never reached.
    """
    for quantizer in activation_quantizers(model):
        quantizer.set_range_from_histogram(calibrator)
    for quantizer, weight in weight_quantizers(model):
        quantizer.set_range_from_weight(weight)
    if dead_range is not None:
        for quantizer in quantizers(model):
            quantizer._amax[quantizer._amax == 0] = dead_range


def observations(model: nn.Module) -> dict[str, Observation]:
    """{quantizer: what it quantizes}, of those that have seen anything but zeros.

    Of activations, what the last pass left in the histograms; of weights, each value as a share of its channel's largest.
    """
    weights = {quantizer: weight_histogram(quantizer, weight) for quantizer, weight in weight_quantizers(model)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            histogram = weights.get(module, module.histogram)
            if histogram is not None and histogram.amax > 0:
                found[name] = Observation(histogram, module.spec.bits)
    return found


def weight_histogram(quantizer: TensorQuantizer, weight: Tensor) -> Histogram:
    """Of |w| as a share of the largest with the same range, 0 where all of those are 0."""
    histogram = Histogram()
    histogram.add((weight.detach() / quantizer.largest(weight)).nan_to_num().cpu().numpy())
    return histogram


def merge_ranks(observers: list[TensorQuantizer]) -> None:
    """Adds up the histograms of all ranks, so that every rank has those of a single process over all images."""
    if not (dist.is_initialized() and observers):
        return
    device = observers[0]._amax.device
    histograms = [quantizer.histogram for quantizer in observers if quantizer.histogram is not None]
    amax = torch.tensor([histogram.amax for histogram in histograms], dtype=torch.float64, device=device)
    dist.all_reduce(amax, dist.ReduceOp.MAX)
    for histogram, largest in zip(histograms, amax.tolist(), strict=True):
        histogram.reserve(largest)  # the bins of all ranks are now the same
    counts = torch.from_numpy(np.stack([histogram.counts for histogram in histograms])).to(device)
    dist.all_reduce(counts)
    for histogram, total in zip(histograms, counts.cpu().numpy(), strict=True):
        histogram.counts = total
