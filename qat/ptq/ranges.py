"""The ranges of all quantizers, from one pass over some images."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qswin.calib.calibrators import Histogram
from qswin.calib.histogram_file import Observation
from qswin.qat.ptq.ranks import reduced
from qswin.qat.quant.layers import weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import enable
from qswin.qat.quant.weight_ranges import largest


def find_ranges(model: nn.Module, batches: Iterable[Any], dead_range: float | None = None) -> int:
    """Calibrates every quantizer of a rewritten model in one pass and switches them on.

    Under torch.distributed each rank passes its own batches, and all end with the ranges of the whole. When it fails,
    all quantizers are as they were before.

    Args:
        batches: (N, 3, H, W), or tuples or lists that begin with such a tensor, as a DataLoader of (images, labels)
            gives. They are moved to the model's device.
        dead_range: stands in for ranges that come out as 0.

    Returns:
        The number of images seen by this rank.

    Raises:
        ValueError: a batch is something else; there were no images; or a range is dead and `dead_range` is None, whose
            site is named.
    """
    with _restored_on_failure(model):
        for quantizer in quantizers(model):
            quantizer.disable(quiet=True)  # weights too: ranges are those of the float model
        activations = activation_quantizers(model)
        for quantizer in activations:
            quantizer.observe(quiet=True)
        images = _pass(model, image_tensors(model, batches))
        merge_ranks(activations)
        check_count(model, images)
        set_ranges(model, dead_range=dead_range)
        enable(model)
    return images


def image_tensors(model: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
    """The images of each batch, on the model's device. Raises ValueError where `find_ranges` does."""
    device = device_of(model)
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor):
            kind = type(batch).__name__
            what = "give tensors (N, 3, H, W), or tuples that begin with one"
            raise ValueError(f"a calibration batch is a {kind}; {what}")
        yield images.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def check_count(model: nn.Module, images: int) -> None:
    """Raises ValueError where this rank, or another one, has no images."""
    if not reduced(torch.tensor(images, device=device_of(model)), dist.ReduceOp.MIN):
        raise ValueError("calibration saw 0 images; raise calibration.images or check data.root")


def _pass(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Runs a model over batches and counts the images."""
    total = 0
    with torch.inference_mode():
        for images in batches:
            model(images)
            total += len(images)
    return total


@contextlib.contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Gives every quantizer its state and range back when what is done inside fails, for whatever reason."""
    before = [(each, each.mode, each.warns, each.histogram, each._amax.clone()) for each in quantizers(model)]
    try:
        yield
    except BaseException:
        for quantizer, mode, warns, histogram, amax in before:
            quantizer.mode, quantizer.warns, quantizer.histogram = mode, warns, histogram
            quantizer._amax.copy_(amax)
        raise


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

    Of activations, what the last pass left in the histograms; of weights, each value's share of its channel's largest.
    """
    weights = {quantizer: weight_histogram(quantizer, weight) for quantizer, weight in weight_quantizers(model)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            histogram = weights.get(module, module.histogram)
            if histogram is not None and histogram.amax > 0:
                found[name] = Observation(histogram, module.spec.grid.name)
    return found


def weight_histogram(quantizer: TensorQuantizer, weight: Tensor) -> Histogram:
    """Of |w| as a share of the largest with the same range, 0 where all of those are 0."""
    histogram = Histogram()
    histogram.add((weight.detach() / largest(weight, quantizer.spec.axis)).nan_to_num().cpu().numpy())
    return histogram


def merge_ranks(observers: list[TensorQuantizer]) -> None:
    """Adds up the histograms of all ranks, so that every rank has those of a single process over all images."""
    if not (dist.is_initialized() and observers):
        return
    device = observers[0]._amax.device
    histograms = [quantizer.histogram for quantizer in observers if quantizer.histogram is not None]
    amax = torch.tensor([histogram.amax for histogram in histograms], dtype=torch.float64, device=device)
    dist.all_reduce(amax, dist.ReduceOp.MAX)
    for histogram, of_all in zip(histograms, amax.tolist(), strict=True):
        histogram.reserve(of_all)  # the bins of all ranks are now the same
    counts = torch.from_numpy(np.stack([histogram.counts for histogram in histograms])).to(device)
    dist.all_reduce(counts)
    for histogram, total in zip(histograms, counts.cpu().numpy(), strict=True):
        histogram.counts = total
