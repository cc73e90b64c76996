"""Post-training quantization: ranges from a pass over some images. The command `qswin calibrate`."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from absl import logging
from torch import Tensor, nn
from tqdm import tqdm

from qswin.calib.calibrators import Histogram
from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import check_class_count, draw_samples, scan_folder
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import sha256
from qswin.calib.histogram_file import HISTOGRAMS, Observation, save_histograms
from qswin.models.registry import family_of
from qswin.qat.checkpoint import Description, save_checkpoint
from qswin.qat.config import CalibrationConfig, Config, build_float_model, claim_run, model_arguments, recipe_of
from qswin.qat.distributed import Ranks
from qswin.qat.ptq.bias_correction import correct_biases
from qswin.qat.ptq.choose_calibrators import choose_calibrators
from qswin.qat.ptq.reconstruction import reconstruct
from qswin.qat.quant.layers import weight_quantizers
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import enable, quantize


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


def check(options: CalibrationConfig, ranks: Ranks) -> None:
    """Raises ValueError for settings that the schema's types let through."""
    if ranks.world > 1 and _needs_images_again(options):
        raise ValueError("calibration's choose, correct_biases and reconstruct_steps need one process; leave torchrun out")


def _needs_images_again(options: CalibrationConfig) -> bool:
    """Whether more is asked for than ranges, which one pass finds."""
    return options.choose or options.correct_biases or options.reconstruct_steps > 0


def prepare(model: nn.Module, batches: Iterable[Tensor], options: CalibrationConfig, dead_range: float | None) -> int:
    """Calibrates as a config says, with choice of calibrators, bias correction and reconstruction after.

    Returns:
        The number of images.
    """
    if not _needs_images_again(options):
        return calibrate(model, batches, dead_range)
    kept = list(batches)
    images = calibrate(model, kept, dead_range)
    if options.choose:
        choose_calibrators(model, kept[:2])  # hundreds of passes over each block: a few dozen images must do
    if options.correct_biases:
        correct_biases(model, kept[:4])  # a mean needs few images, and each layer is a pass
    if options.reconstruct_steps:
        reconstruct(model, kept, options.reconstruct_steps, options.reconstruct_lr, options.reconstruct_range_lr)
    return images


def run_calibration(config: Config, ranks: Ranks) -> Path:
    """Builds, quantizes, calibrates; writes <run>/ptq.safetensors, which it returns, and the histograms beside it."""
    recipe = recipe_of(config)
    if not recipe.rules:
        raise ValueError("recipe 'none' quantizes nothing; choose gemm or full")
    check(config.calibration, ranks)
    folder = scan_folder(family_of(config.model.name).TASK, Path(config.data.root) / "train")
    samples = draw_samples(folder, config.calibration.images, config.seed)
    model, preprocessing = build_float_model(config)
    check_class_count(folder.root, len(folder.classes), model.num_classes)
    twin = quantize(model, recipe).to(ranks.device)
    run = claim_run(config, "calibrate", ("ptq.safetensors",))
    skipped: list[ImageFile] | None = [] if config.data.skip_unreadable else None
    mine = samples[ranks.rank :: ranks.world]
    batches = image_batches(mine, preprocessing, config.calibration.batch_size, config.data.workers, skipped)
    tensors = (torch.from_numpy(batch.images).to(ranks.device) for batch in batches)
    steps = -(-len(mine) // config.calibration.batch_size)
    quiet = not (ranks.main and sys.stderr.isatty())
    start = time.perf_counter()
    images = prepare(twin, tqdm(tensors, "calibrate", steps, disable=quiet), config.calibration, recipe.dead_range)
    seconds = time.perf_counter() - start
    total, left_out = ranks.sum([images, len(skipped or ())])
    checkpoint = config.model.checkpoint
    description = Description(
        model_arguments(config),
        "ptq",
        preprocessing,
        folder.classes,
        recipe,
        parent=None if checkpoint is None else sha256(checkpoint),
        metrics={"calibration_images": int(total), "unreadable_images": int(left_out)},
    )
    path = run / "ptq.safetensors"
    if ranks.main:
        save_checkpoint(path, twin, description)
        save_histograms(run / HISTOGRAMS, observations(twin))
        sites = len(list(quantizers(twin)))
        logging.info("%s: %d quantizers from %d images in %.1f s", path, sites, total, seconds)
    return path
