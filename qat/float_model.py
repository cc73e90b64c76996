"""The float model that a config describes."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import read_sidecar, sidecar_path
from qswin.calib.validation import validate
from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.weights import Weights
from qswin.models.registry import build_model, family_of, read_checkpoint
from qswin.qat.schema import ModelConfig

OWN = "the model's own"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the trained weights of a checkpoint once came from.

    Args:
        library: such as "torchvision".
        preprocessing: where the preprocessing under the config's settings was taken from.
        settings: of the architecture, that the weights asked for.
    """

    library: str
    preprocessing: str = OWN
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """A float model and what is known of it.

    Args:
        arguments: build_model's, without where the weights come from: what a sidecar keeps.
        sha256: of the file of the weights; None where they are downloaded or random.
        classes: names in the order of the logits, where the weights' library says them.
    """

    model: Any
    arguments: dict[str, Any]
    preprocessing: Preprocessing
    source: Origin | None = None
    sha256: str | None = None
    classes: tuple[str, ...] | None = None


def config_of(recognized: Recognized, checkpoint: Path, num_classes: int | None, new_head: bool = False) -> ModelConfig:
    """The config of a model with the weights of a file or folder, that was recognized."""
    return ModelConfig(recognized.name, str(checkpoint), False, num_classes, new_head, dict(recognized.settings))


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """build_model's arguments that a config sets, without where the weights come from."""
    return {"name": config.name, "num_classes": config.num_classes, **config.kwargs}


def build_float_model(
    config: ModelConfig, preprocessing: dict[str, Any], train_head: bool = False, weights: Weights | None = None
) -> FloatModel:
    """The float model of a config, with its weights.

    Args:
        preprocessing: settings over the weights' and the model's own.
        train_head: the model is to be trained, so that its head may be a new one.
        weights: those of `config.checkpoint`, where they have been read.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a setting is wrong, or the weights are another model's or cannot be downloaded.
    """
    if config.new_head and not train_head:
        what = "the new head would be random here; train the float model first (qswin train recipe=none)"
        raise ValueError(f"model.new_head=true: {what}, then give model.checkpoint=<run>/float.safetensors without it")
    if weights is None and config.checkpoint is not None:
        weights = read_checkpoint(config.name, config.checkpoint)
    if weights is not None:
        weights = _with_sidecar(config.name, weights)
    arguments = model_arguments(config)
    model = build_model(
        checkpoint=weights, pretrained=config.pretrained, new_head=config.new_head and train_head, **arguments
    )
    own = family_of(config.name).preprocessing(model)
    if weights is None:
        return FloatModel(model, arguments, _fitting(config.name, model, own, preprocessing))
    own |= weights.preprocessing
    adapted_to = _fitting(config.name, model, _of_grey(own) if weights.grey else own, preprocessing)
    if weights.grey:
        _check_grey(weights, adapted_to)
    settings = {**weights.settings, **arguments}
    return FloatModel(model, settings, adapted_to, _origin(weights), weights.sha256, weights.classes)


def _of_grey(own: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing with one mean and one standard deviation for all channels, those of the channels' own."""
    return {**own, **{key: (sum(own[key]) / 3,) * 3 for key in ("mean", "std")}}


def _check_grey(weights: Weights, prepared: Preprocessing) -> None:
    """Says how images are prepared for weights of one channel. Raises ValueError where channels would differ."""
    what = f"{weights.file}: takes grey images, of which each channel here is one"
    for key, values in (("mean", prepared.mean), ("std", prepared.std)):
        if len(set(values)) > 1:
            raise ValueError(f"{what}; data.preprocessing.{key} is {list(values)}: give one value, three times")
    told = f"mean {prepared.mean[0]:.4g} and std {prepared.std[0]:.4g} (set data.preprocessing where it had others)"
    logging.info("%s: %s", what, told)


def _with_sidecar(name: str, weights: Weights) -> Weights:
    """The weights; of a checkpoint that qswin saved, the sidecar says what they need."""
    if weights.file is None or not sidecar_path(weights.file).is_file():
        return weights
    try:
        sidecar = read_sidecar(weights.file, "checkpoint", ("model", "preprocessing"), "its model and config count")
        model, preprocessing = dict(sidecar["model"]), dict(sidecar["preprocessing"])
        library = (sidecar.get("source") or {"library": "qswin"})["library"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logging.warning("%s: its sidecar is not taken into account (%s)", weights.file, error)
        return weights
    if model.pop("name", None) != name:
        return weights
    preprocessing.pop("size", None)
    own = {key: value for key, value in model.items() if key != "num_classes"}
    told = sidecar_path(weights.file).name
    return dataclasses.replace(
        weights, settings=own, preprocessing=preprocessing, preprocessing_from=told, library=str(library)
    )


def _origin(weights: Weights) -> Origin | None:
    if weights.library is None:
        return None
    return Origin(weights.library, weights.preprocessing_from or OWN, weights.settings)


def _fitting(name: str, model: Any, own: dict[str, Any], configured: dict[str, Any]) -> Preprocessing:
    """The adapted preprocessing. Raises ValueError, too, where its size is not the model's."""
    adapted_to = adapted(own, configured)
    if input_size(model) not in (None, adapted_to.size):
        taken = f"model {name} takes {input_size(model)}"
        raise ValueError(f"data.preprocessing.size is {adapted_to.size}, but {taken}; set model.kwargs.img_size too")
    return adapted_to


def check_class_order(root: Path, found: tuple[str, ...], expected: tuple[str, ...] | None) -> None:
    """Raises ValueError where a folder's classes are those of the weights, in another order: labels would be wrong.

    Names that differ are not compared: a folder may have other names for the same classes.
    """
    if expected is None or set(expected) != set(found) or expected == found:
        return
    index = next(index for index, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    what = f"class {index} is {found[index]!r} here but {expected[index]!r} in the checkpoint"
    raise ValueError(f"{root}: {what}; an index is a folder's place among the sorted names: rename the folders")


def input_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of the images that a model takes; None where it takes any, or does not say."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return tuple(size) if size is not None and getattr(embed, "strict_img_size", True) else None


def adapted(own: dict[str, Any], configured: dict[str, Any]) -> Preprocessing:
    """A model's own preprocessing under what a config sets of it. One number as `size` is the side of a square.

    Raises:
        ValueError: a key is not known, or a value cannot be used; the key is named.
    """
    known = [field.name for field in dataclasses.fields(Preprocessing)]
    unknown = [key for key in configured if key not in known]
    if unknown:
        raise ValueError(f"data.preprocessing.{unknown[0]} is not known; the keys are {', '.join(known)}")
    size = configured.get("size", own["size"])
    size = [size, size] if isinstance(size, int) else size
    return validate({**own, **configured, "size": size}, Preprocessing, "data.preprocessing")
