"""What training starts from: a checkpoint that must be what the config describes, or a float model."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qswin.calib.data.folders import ImageFolder, check_class_count
from qswin.qat.checkpoint import Description, open_checkpoint
from qswin.qat.float_model import adapted, build_float_model, check_class_order, model_arguments
from qswin.qat.quant.recipe import RECIPES, Recipe
from qswin.qat.runs import first_difference, flatten
from qswin.qat.schema import ModelConfig

# Of a recipe: what is calibration's alone.
CALIBRATION = ("calibrator", "weight_calibrator", "dead_range", "budget", "in_float")


def float_start(
    config: ModelConfig, preprocessing: dict[str, Any], recipe: Recipe, folder: ImageFolder
) -> tuple[nn.Module, Description]:
    """The float model of a config, to be trained as it is.

    Raises:
        ValueError: the recipe quantizes something, or the model has not as many classes as the folder.
    """
    if recipe.rules:
        raise ValueError(
            "QAT starts from a calibrated checkpoint: run qswin calibrate first and give init=<run>/ptq.safetensors"
        )
    floating = build_float_model(config, preprocessing, train_head=True)
    check_class_count(folder.root, len(folder.classes), floating.model.num_classes)
    if not config.new_head:
        check_class_order(folder.root, folder.classes, floating.classes)
    description = Description(
        floating.arguments, "float", floating.preprocessing, folder.classes, source=floating.source
    )
    return floating.model, description


def checkpoint_start(
    init: Path, config: ModelConfig, preprocessing: dict[str, Any], recipe: Recipe, folder: ImageFolder
) -> tuple[nn.Module, Description]:
    """The model of a checkpoint, and the sidecar of what training will make of it.

    Args:
        preprocessing: what the config sets explicitly.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: its model, preprocessing, recipe or classes are not the config's; the first difference is named.
    """
    if config.new_head:
        raise ValueError(f"model.new_head=true: the head of init={init} is trained on; leave one of the two out")
    model, description, digest = open_checkpoint(init)
    asked_for = {} if description.source is None else description.source.settings
    check_model(init, description.model, {**asked_for, **model_arguments(config)})
    check_preprocessing(init, description, preprocessing)
    check_recipe(init, description.recipe or RECIPES["none"], recipe)
    if description.classes is not None and description.classes != folder.classes:
        raise ValueError(f"{folder.root}: its classes are not those of {init}")
    stage: Literal["float", "qat"] = "qat" if description.recipe else "float"
    return model, dataclasses.replace(description, stage=stage, classes=folder.classes, parent=digest)


def check_model(init: Path, started: dict[str, Any], configured: dict[str, Any]) -> None:
    """Raises ValueError unless two models' names, classes and settings, which imply the task, are the same."""
    for key in ("name", *sorted((started.keys() | configured.keys()) - {"name"})):
        before, now = (json.loads(json.dumps(values.get(key))) for values in (started, configured))  # tuples are lists
        if before != now:
            setting = f"model.{key}" if key in ("name", "num_classes") else f"model.kwargs.{key}"
            raise ValueError(f"{init}: its model has {key}={before}, the config {setting}={now}; they must be the same")


def check_preprocessing(init: Path, description: Description, configured: dict[str, Any]) -> None:
    """Raises ValueError when a config sets a preprocessing that is not the checkpoint's."""
    own = description.preprocessing.to_dict()
    found = first_difference(own, adapted(own, configured).to_dict())
    if found is not None:
        key, before, now = found
        raise ValueError(
            f"{init}: its preprocessing has {key}={before}, data.preprocessing.{key} is {now}; leave it out"
        )


def check_recipe(init: Path, started: Recipe, configured: Recipe) -> None:
    """Raises ValueError unless two recipes quantize the same sites in the same way, whatever they are called."""
    found = first_difference(_quantization(started), _quantization(configured))
    if found is None:
        return
    if started.name != configured.name:
        raise ValueError(
            f"{init}: its recipe is {started.name!r}, the config's is {configured.name!r}; set recipe={started.name}"
        )
    key, before, now = found
    what = f"its recipe {started.name!r} has {key}={before}, the config's has {now}"
    raise ValueError(f"{init}: {what}; calibrate again, or give the recipe that it was calibrated with")


def _quantization(recipe: Recipe) -> dict[str, Any]:
    """What a recipe quantizes and how, flat: without its name, and without how ranges are found."""
    values = recipe.to_dict()
    rules = [{key: value for key, value in rule.items() if key not in CALIBRATION} for rule in values["rules"]]
    kept = {key: value for key, value in values.items() if key not in (*CALIBRATION, "name")}
    return flatten({**kept, "rules": [rule for rule in rules if set(rule) - {"sites"}]})
