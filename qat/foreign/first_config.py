"""A config for a checkpoint that was found somewhere: what it is, from its tensors, as a YAML file with comments."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from qswin.calib.data.folders import scan_folder
from qswin.calib.messages import printable
from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.weights import Weights
from qswin.models.registry import family_of, recognize
from qswin.qat.float_model import FloatModel, build_float_model, config_of


@dataclasses.dataclass(frozen=True)
class Found:
    """What a checkpoint is, and the folder of images that it is for.

    Args:
        path: as it was given.
        classes: of the folder of images; None without one.
        floating: the model with the weights, or with a new head where it takes one.
    """

    path: Path
    weights: Weights
    recognized: Recognized
    floating: FloatModel
    data: Path | None = None
    classes: int | None = None

    @property
    def new_head(self) -> bool:
        """Whether its head does not serve: there is none, or the images are of another number of classes."""
        own = self.recognized.num_classes
        return own is None or self.classes not in (None, own)

    @property
    def model(self) -> dict[str, Any]:
        """The config's section `model`."""
        classes = self.floating.model.num_classes
        new_head = {"new_head": True} if self.new_head else {}
        values = {"name": self.recognized.name, "checkpoint": str(self.path), "num_classes": classes, **new_head}
        return {**values, **({"kwargs": self.recognized.settings} if self.recognized.settings else {})}

    def facts(self) -> dict[str, Any]:
        """What is said of it: for people and, as JSON, for programs."""
        source, prepared = self.floating.source, self.floating.preprocessing
        return {
            "checkpoint": str(self.path),
            "library": None if source is None else source.library,
            "model": self.recognized.name,
            "settings": {**self.weights.settings, **self.recognized.settings},
            "classes": self.recognized.num_classes,
            "image_size": list(prepared.size),
            "preprocessing": prepared.to_dict(),
            "preprocessing_from": None if source is None else source.preprocessing,
            "assumed": list(self.recognized.assumed),
            "new_head": self.new_head,
        }


def look_at(path: Path, data: Path | None) -> Found:
    """What a checkpoint is; the model is built, and its weights are loaded, to be sure.

    Args:
        data: a folder with `train`, whose classes are counted.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a checkpoint of a model that is known; it has no head, and no images say how many classes
            a new one is for; or the folder holds no images where some should be.
    """
    weights, recognized = recognize(path)
    if recognized.num_classes is None and data is None:
        what = (
            f"{recognized.name} of {weights.library} without a head ({weights.headless or 'its tensors are missing'})"
        )
        backbone = "or write a config with model.kwargs.out_features for a backbone (docs/backbones.md)"
        raise ValueError(f"{path}: {what}; give --data DIR, the images whose classes a new head is for, {backbone}")
    task = family_of(recognized.name).task
    classes = None if data is None else len(scan_folder(task, data / "train").classes)
    new_head = recognized.num_classes is None or classes not in (None, recognized.num_classes)
    config = config_of(recognized, path, classes or recognized.num_classes, new_head)
    floating = build_float_model(config, {}, train_head=new_head, weights=weights)
    return Found(path, weights, recognized, floating, data, classes)


def describe(found: Found) -> str:
    """A line or more about it, for people."""
    facts, prepared = found.facts(), found.floating.preprocessing
    classes = "without a head" if facts["classes"] is None else f"{facts['classes']} classes"
    told = f"{found.path}: {facts['model']} of {facts['library']}, {classes}, images of {prepared.size[0]} pixels"
    lines = [told, f"preprocessing: {facts['preprocessing_from']} ({_prepared(found)})"]
    lines += [f"assumed: {assumed}" for assumed in found.recognized.assumed]
    return "\n".join([*lines, *([_head(found)] if found.new_head else [])])


def _prepared(found: Found) -> str:
    prepared = found.floating.preprocessing
    how = "whole image" if prepared.crop_mode == "squash" else "shorter side"
    return f"{how} to {int(prepared.size[0] / prepared.crop_pct)}, {prepared.interpolation}, crop {prepared.size[0]}"


def _head(found: Found) -> str:
    why = found.weights.headless or "its head is missing"
    if found.recognized.num_classes is not None:
        why = f"its head has {found.recognized.num_classes} classes, the images {found.classes}"
    return f"new head: {why}; train the float model before you calibrate"


def config_text(found: Found, out: Path) -> str:
    """The YAML of a config, with what to run in its comments. `out` is the file's name."""
    run = f"runs/{out.stem}"
    comments = [*describe(found).splitlines(), "What to run:", *_commands(found, out, run)]
    recipe = "none" if found.new_head else "auto"
    what = "nothing is quantized: the new head is trained first" if found.new_head else "see docs/recipes.md"
    root = "# root: DIR" if found.data is None else f"root: {_scalar(str(found.data))}"
    lines = [
        *(f"# {printable(comment)}" for comment in comments),
        "model:",
        *(f"  {key}: {_scalar(value)}" for key, value in found.model.items()),
        "data:",
        f"  {root}  # its train/ and val/ hold one folder of images a class",
        "  workers: 4",
        f"recipe: {recipe}  # {what}",
        "calibration:",
        "  images: 512  # of train/, drawn at random",
        f"run: {_scalar(run)}",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value in YAML, on one line; JSON is YAML, and names need no quotes."""
    plain = isinstance(value, str) and value.isprintable() and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _commands(found: Found, out: Path, run: str) -> list[str]:
    root = "" if found.data is not None else " data.root=DIR"
    calibrate = f"qswin calibrate --config {out}{root}"
    if not found.new_head:
        return [f"  {calibrate}"]
    trained = f"model.checkpoint={run}/float/float.safetensors model.new_head=false recipe=auto"
    return [f"  qswin train --config {out}{root} run={run}/float", f"  {calibrate} {trained}"]
