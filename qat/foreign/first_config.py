"""A config for a checkpoint that was found somewhere: what it is, from its tensors, as a YAML file with comments."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from qswin.calib.data.folders import scan_unlabelled, training_folder
from qswin.calib.messages import printable
from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.weights import Weights
from qswin.models.registry import family_of, recognize
from qswin.qat.float_model import FloatModel, build_float_model, config_of

IN_CLASSES = "its train/ and val/ hold one folder of images a class"
SWIN_DEPTHS = (2, 2, 6, 2)  # of as many stages, where no setting says otherwise


@dataclasses.dataclass(frozen=True)
class Found:
    """What a checkpoint is, and the folder of images that it is for.

    Args:
        path: as it was given.
        floating: the model with the weights, or with a new head where it takes one.
        classes: of the folder of images; None without one, and for a backbone.
        out_features: the feature maps of a backbone; empty for a model with a head.
    """

    path: Path
    weights: Weights
    recognized: Recognized
    floating: FloatModel
    data: Path | None = None
    classes: int | None = None
    out_features: tuple[str, ...] = ()

    @property
    def new_head(self) -> bool:
        """Whether its head does not serve: there is none, or the images are of another number of classes."""
        if self.out_features:
            return False
        own = self.recognized.num_classes
        return own is None or self.classes not in (None, own)

    @property
    def model(self) -> dict[str, Any]:
        """The config's section `model`."""
        values = {"name": self.recognized.name, "checkpoint": str(self.path)}
        if not self.out_features:
            values["num_classes"] = self.floating.model.num_classes
        kwargs = self.recognized.settings | ({"out_features": list(self.out_features)} if self.out_features else {})
        return {**values, **({"new_head": True} if self.new_head else {}), **({"kwargs": kwargs} if kwargs else {})}

    def facts(self) -> dict[str, Any]:
        """What is said of it: for people and, as JSON, for programs."""
        source, prepared = self.floating.source, self.floating.preprocessing
        return {
            "checkpoint": str(self.path),
            "library": None if source is None else source.library,
            "model": self.recognized.name,
            "settings": {**self.weights.settings, **self.recognized.settings},
            "classes": self.recognized.num_classes,
            "out_features": list(self.out_features),
            "image_size": list(prepared.size),
            "preprocessing": prepared.to_dict(),
            "preprocessing_from": None if source is None else source.preprocessing,
            "assumed": list(self.recognized.assumed),
            "new_head": self.new_head,
        }


def look_at(path: Path, data: Path | None, backbone: bool = False) -> Found:
    """What a checkpoint is; the model is built, and its weights are loaded, to be sure.

    Args:
        data: a folder with `train`, whose classes are counted.
        backbone: its feature maps are wanted, and its head, if it has one, is not.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a checkpoint of a model that is known; it has no head, and no images say how many classes
            a new one is for; it has no feature maps; or the folder holds no images where some should be.
    """
    weights, recognized = recognize(path)
    if backbone:
        return _backbone(path, data, weights, recognized)
    task = family_of(recognized.name).task
    classes = None if data is None else len(scan_unlabelled(task, training_folder(data)).classes) or None
    if recognized.num_classes is None and classes is None:
        what = f"without a head ({weights.headless or 'its tensors are missing'})"
        needed = "give --data DIR, the folders of images whose classes a new head is for, or --backbone for its maps"
        raise ValueError(f"{path}: {recognized.name} of {weights.library} {what}; {needed}")
    new_head = recognized.num_classes is None or classes not in (None, recognized.num_classes)
    config = config_of(recognized, path, classes or recognized.num_classes, new_head)
    floating = build_float_model(config, {}, train_head=new_head, weights=weights)
    return Found(path, weights, recognized, floating, data, classes)


def _backbone(path: Path, data: Path | None, weights: Weights, recognized: Recognized) -> Found:
    """Of the stages whose feature maps have norms, where some have, or of all."""
    if "out_features" not in family_of(recognized.name).settings:
        needed = "--backbone takes Swin, V1 or V2, and Swin-Unet"
        raise ValueError(f"{path}: {recognized.name} gives no feature maps; {needed}")
    stages = range(len(recognized.settings.get("depths", SWIN_DEPTHS)))
    with_norm = [stage for stage in stages if f"norm{stage}.weight" in weights.state]
    names = tuple(f"stage{stage + 1}" for stage in with_norm or stages)
    config = config_of(recognized, path, None)
    config.kwargs["out_features"] = list(names)
    floating = build_float_model(config, {}, weights=weights)
    return Found(path, weights, recognized, floating, data, out_features=names)


def describe(found: Found) -> str:
    """A line or more about it, for people."""
    facts, prepared = found.facts(), found.floating.preprocessing
    gives = "without a head" if facts["classes"] is None else f"{facts['classes']} classes"
    gives = f"{gives}, images of {prepared.size[0]} pixels"
    if found.out_features:
        gives = f"a backbone that gives {', '.join(found.out_features)}, images of any size"
    told = f"{found.path}: {facts['model']} of {facts['library']}, {gives}"
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


def config_text(found: Found, out: Path, run: str | None = None) -> str:
    """The YAML of a config, with what to run in its comments.

    Args:
        out: the file's name.
        run: the folder of its jobs; None for one named after the file, in runs/.
    """
    run = run or f"runs/{out.stem}"
    comments = [*describe(found).splitlines(), "What to run:", *_commands(found, out, run)]
    recipe = "none" if found.new_head else "auto"
    what = "nothing is quantized: the new head is trained first" if found.new_head else "see docs/recipes.md"
    root = "# root: DIR" if found.data is None else f"root: {_scalar(str(found.data))}"
    images = "its train/ holds images, of any size" if found.out_features else IN_CLASSES
    lines = [
        *(f"# {printable(comment)}" for comment in comments),
        "model:",
        *(f"  {key}: {_scalar(value)}" for key, value in found.model.items()),
        "data:",
        f"  {root}  # {images}",
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
