"""The job of `qswin calibrate`: from a config to a calibrated checkpoint in a run's folder."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn
from tqdm import tqdm

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import ImageFolder, Sample, draw_samples, scan_unlabelled, training_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.histogram_file import HISTOGRAMS, save_histograms
from qswin.models.registry import task_of
from qswin.qat.checkpoint import Description, save_checkpoint
from qswin.qat.distributed import Ranks
from qswin.qat.float_model import FloatModel, build_float_model, check_class_order, model_arguments
from qswin.qat.ptq.calibrate import calibrate, needs_images_again
from qswin.qat.ptq.ranges import observations
from qswin.qat.ptq.verdict import VERDICT_IMAGES, Comparison, tell
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES, Recipe
from qswin.qat.quant.recipe_file import read_recipe
from qswin.qat.quant.rewrite import quantize, recipe_of
from qswin.qat.runs import PTQ, Run
from qswin.qat.schema import CalibrationConfig, Config, DataConfig

VERDICT_SHARE = 8  # at most this part of a folder that has too few for both


def check(options: CalibrationConfig, ranks: Ranks) -> None:
    """Raises ValueError for settings that the schema's types let through."""
    if ranks.world > 1 and needs_images_again(options):
        keys = "choose_calibrators, correct_biases and reconstruct_steps"
        raise ValueError(f"calibration's {keys} need one process; leave torchrun out")


def run_calibration(config: Config, ranks: Ranks) -> Path:
    """Builds, quantizes, calibrates; writes <run>/ptq.safetensors, which it returns, and the histograms beside it.

    What the same job has already made is returned as it is, unless `resume` is "never".

    Raises:
        ValueError: the recipe quantizes nothing, the run's folder is another job's, or calibration fails; says which.
        OSError: images or weights are missing, or nothing could be written.
    """
    recipe = read_recipe(config.recipe, config.calibration.calibrator, config.calibration.budget)
    if not recipe.rules:
        names = ", ".join(name for name, known in RECIPES.items() if known.rules)
        raise ValueError(f"recipe {recipe.name!r} quantizes nothing; choose one of {names}")
    check(config.calibration, ranks)
    run = Run.of(config, "calibrate")
    path = run.folder / PTQ
    if run.finished(PTQ) is not None and (run.folder / HISTOGRAMS).is_file():
        logging.info("%s: already calibrated; resume=never starts over", path)
        return path
    folder = scan_unlabelled(task_of(model_arguments(config.model)), training_folder(config.data.root))
    floating = build_float_model(config.model, config.data.preprocessing)
    preprocessing = floating.preprocessing
    classes = class_names(folder, floating)
    twin = quantize(floating.model, recipe).to(ranks.device)
    if ranks.main:
        run.claim()
    drawn = draw_samples(folder, config.calibration.images + VERDICT_IMAGES, config.seed)
    held = min(VERDICT_IMAGES, len(drawn) // VERDICT_SHARE)
    samples, others = drawn[: len(drawn) - held][: config.calibration.images], drawn[len(drawn) - held :]
    metrics = calibrate_on(
        twin, samples, preprocessing, config.calibration, config.data, recipe.dead_range, config.seed, ranks
    )
    if unseen := list(_load(others, preprocessing, config.calibration, config.data, ranks, [])):
        verdict = Comparison(twin, unseen).verdict()
        tell(verdict, _remedy(config, recipe), config.calibration.strict)
        metrics["verdict"] = verdict.to_dict()
    description = Description(
        floating.arguments,
        "ptq",
        preprocessing,
        classes,
        recipe_of(twin),
        parent=floating.sha256,
        metrics=metrics,
        source=floating.source,
    )
    if ranks.main:
        save_checkpoint(path, twin, description)
        save_histograms(run.folder / HISTOGRAMS, observations(twin))
        logging.info("%s: %d quantizers", path, len(list(quantizers(twin))))
    return path


def class_names(folder: ImageFolder, floating: FloatModel) -> tuple[str, ...] | None:
    """Names of the model's classes: those of the folders of images where they are as many, or the checkpoint's own.

    Raises:
        ValueError: the folders have the names of the checkpoint's classes in another order.
    """
    if len(folder.classes) != floating.model.num_classes:
        if folder.classes:
            told = f"{len(folder.classes)} folders of images, but {floating.model.num_classes} classes in the model"
            logging.warning("%s: %s: they are taken as images alone, and name no classes", folder.root, told)
        return floating.classes
    check_class_order(folder.root, folder.classes, floating.classes)
    return folder.classes or floating.classes


def _load(
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    options: CalibrationConfig,
    data: DataConfig,
    ranks: Ranks,
    skipped: list[ImageFile],
) -> Iterator[Tensor]:
    """The images of samples, in batches on this rank's device; where it may, it adds unreadable files to `skipped`."""
    may_skip = skipped if data.skip_unreadable else None
    for batch in image_batches(samples, preprocessing, options.batch_size, data.workers, may_skip):
        yield torch.from_numpy(batch.images).to(ranks.device)


def _remedy(config: Config, recipe: Recipe) -> str:
    """What mends a bad verdict: the setting that is not yet made and helps the most."""
    if not config.calibration.equalize:
        return "set calibration.equalize=true"
    if recipe.budget is None and recipe.weight_format == recipe.activation_format == "int8":
        return "set recipe=auto, which leaves in float what costs the most"
    return "set calibration.reconstruct_steps=500, or fine-tune with qswin train"


def calibrate_on(
    twin: nn.Module,
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    options: CalibrationConfig,
    data: DataConfig,
    dead_range: float | None,
    seed: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """Calibrates on this rank's share of the samples; returns how many images all ranks have seen and left out."""
    skipped: list[ImageFile] = []
    mine = samples[ranks.rank :: ranks.world]
    tensors = _load(mine, preprocessing, options, data, ranks, skipped)
    steps = -(-len(mine) // options.batch_size)
    quiet = not (ranks.main and sys.stderr.isatty())
    start = time.perf_counter()
    images = calibrate(twin, tqdm(tensors, "calibrate", steps, disable=quiet), options, dead_range, seed)
    seconds = time.perf_counter() - start
    total, left_out = map(int, ranks.sum([images, len(skipped)]))
    if ranks.main:
        logging.info("calibrated on %d images in %.1f s", total, seconds)
    return {"calibration_images": total, "unreadable_images": left_out}
