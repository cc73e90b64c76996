"""The job of `qswin calibrate`: from a config to a calibrated checkpoint in a run's folder."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor, nn
from tqdm import tqdm

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import ImageFolder, Sample, draw_samples, scan_unlabelled, training_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.files import sidecar_path
from qswin.calib.histogram_file import HISTOGRAMS, save_histograms
from qswin.models.registry import task_of
from qswin.qat.checkpoint import Description, save_checkpoint
from qswin.qat.distributed import Ranks
from qswin.qat.float_model import FloatModel, build_float_model, check_class_order, model_arguments
from qswin.qat.plan import check_readable, model_fact, plan_text, sites_fact
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


class Prepared(NamedTuple):
    """A calibration that is checked and may begin.

    Args:
        samples: to calibrate on.
        held: others, for the verdict.
    """

    recipe: Recipe
    run: Run
    floating: FloatModel
    twin: nn.Module
    folder: ImageFolder
    classes: tuple[str, ...] | None
    samples: list[Sample]
    held: list[Sample]

    @property
    def path(self) -> Path:
        """The checkpoint that is made."""
        return self.run.folder / PTQ


def _is_done(run: Run) -> bool:
    return run.finished(PTQ) is not None and (run.folder / HISTOGRAMS).is_file()


def _checked(config: Config, ranks: Ranks) -> tuple[Recipe, Run]:
    """The recipe, and the run's folder. Raises ValueError where either cannot be used."""
    recipe = read_recipe(config.recipe, config.calibration.calibrator, config.calibration.budget)
    if not recipe.rules:
        names = ", ".join(name for name, known in RECIPES.items() if known.rules)
        raise ValueError(f"recipe {recipe.name!r} quantizes nothing; choose one of {names}")
    check(config.calibration, ranks)
    return recipe, Run.of(config, "calibrate")


def _prepare(config: Config, ranks: Ranks, recipe: Recipe, run: Run) -> Prepared:
    """Finds the images and builds the twin. Raises as `run_calibration` does."""
    folder = scan_unlabelled(task_of(model_arguments(config.model)), training_folder(config.data.root))
    floating = build_float_model(config.model, config.data.preprocessing)
    classes = class_names(folder, floating)
    twin = quantize(floating.model, recipe).to(ranks.device)
    drawn = draw_samples(folder, config.calibration.images + VERDICT_IMAGES, config.seed)
    held = min(VERDICT_IMAGES, len(drawn) // VERDICT_SHARE)
    samples, others = drawn[: len(drawn) - held][: config.calibration.images], drawn[len(drawn) - held :]
    return Prepared(recipe, run, floating, twin, folder, classes, samples, others)


def plan_calibration(config: Config, ranks: Ranks) -> str:
    """What `run_calibration` would do. All that it reads is checked, and nothing is written. Raises as it does."""
    recipe, run = _checked(config, ranks)
    prepared = _prepare(config, ranks, recipe, run)
    options, size = config.calibration, prepared.floating.preprocessing
    everything = [*prepared.samples, *prepared.held]
    images = check_readable(everything, size, options.batch_size, config.data.workers, config.data.skip_unreadable)
    held = f"{len(prepared.held)} for the verdict" if prepared.held else "none for a verdict"
    facts = {
        "model": model_fact(prepared.floating.arguments, prepared.floating.model, size, config.model.checkpoint),
        "recipe": f"{recipe.name}, {sites_fact(prepared.twin)}",
        "images": f"{images} of the {len(prepared.folder.samples)} in {prepared.folder.root}, {held}",
        "device": str(ranks.device),
    }
    if _is_done(run):
        return plan_text(
            "calibrate", facts | {"state": f"done: {prepared.path} is there; resume=never starts over"}, []
        )
    return plan_text("calibrate", facts, [prepared.path, sidecar_path(prepared.path), run.folder / HISTOGRAMS])


def run_calibration(config: Config, ranks: Ranks) -> Path:
    """Builds, quantizes, calibrates; writes <run>/ptq.safetensors, which it returns, and the histograms beside it.

    What the same job has already made is returned as it is, unless `resume` is "never".

    Raises:
        ValueError: the recipe quantizes nothing, the run's folder is another job's, or calibration fails; says which.
        OSError: images or weights are missing, or nothing could be written.
    """
    recipe, run = _checked(config, ranks)
    if _is_done(run):
        path = run.folder / PTQ
        logging.info("%s: already calibrated; resume=never starts over", path)
        return path
    start = time.perf_counter()
    prepared = _prepare(config, ranks, recipe, run)
    if ranks.main:
        run.claim()
    description = _calibrate(prepared, config, ranks)
    if ranks.main:
        save_checkpoint(prepared.path, prepared.twin, description)
        save_histograms(run.folder / HISTOGRAMS, observations(prepared.twin))
        count, skipped = len(list(quantizers(prepared.twin))), description.metrics["unreadable_images"]
        seen = f"{description.metrics['calibration_images']} images" + (f" ({skipped} skipped)" if skipped else "")
        logging.info("%s: %d quantizers from %s in %.1f s", prepared.path, count, seen, time.perf_counter() - start)
    return prepared.path


def _calibrate(prepared: Prepared, config: Config, ranks: Ranks) -> Description:
    """Calibrates the twin and compares it with the float model; returns what its sidecar says."""
    floating, twin, recipe = prepared.floating, prepared.twin, prepared.recipe
    metrics = calibrate_on(
        twin,
        prepared.samples,
        floating.preprocessing,
        config.calibration,
        config.data,
        recipe.dead_range,
        config.seed,
        ranks,
    )
    if unseen := list(_load(prepared.held, floating.preprocessing, config.calibration, config.data, ranks, [])):
        verdict = Comparison(twin, unseen).verdict()
        tell(verdict, _remedy(config, recipe), config.calibration.strict)
        metrics["verdict"] = verdict.to_dict()
    return Description(
        floating.arguments,
        "ptq",
        floating.preprocessing,
        prepared.classes,
        recipe_of(twin),
        parent=floating.sha256,
        metrics=metrics,
        source=floating.source,
    )


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
    images = calibrate(twin, tqdm(tensors, "calibrate", steps, disable=quiet), options, dead_range, seed)
    total, left_out = map(int, ranks.sum([images, len(skipped)]))
    return {"calibration_images": total, "unreadable_images": left_out}
