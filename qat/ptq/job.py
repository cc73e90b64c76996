"""The job of `qswin calibrate`: from a config to a calibrated checkpoint in a run's folder."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from absl import logging
from torch import Tensor, nn
from tqdm import tqdm

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import check_class_count, draw_samples, scan_folder
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import sha256
from qswin.calib.histogram_file import HISTOGRAMS, save_histograms
from qswin.models.registry import family_of
from qswin.qat.checkpoint import Description, save_checkpoint
from qswin.qat.config import CalibrationConfig, Config, build_float_model, claim_run, model_arguments, recipe_of
from qswin.qat.distributed import Ranks
from qswin.qat.ptq.bias_correction import correct_biases
from qswin.qat.ptq.calibrate import calibrate, observations
from qswin.qat.ptq.choose_calibrators import choose_calibrators
from qswin.qat.ptq.reconstruction import reconstruct
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.rewrite import quantize


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
    folder = scan_folder(family_of(config.model.name).task, Path(config.data.root) / "train")
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
