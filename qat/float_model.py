"""The float model that a config describes."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from qswin.calib.data.images import Preprocessing
from qswin.calib.validation import validate
from qswin.models.registry import build_model, family_of, load_weights
from qswin.models.state_dicts import read_content
from qswin.qat.schema import ModelConfig


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """build_model's arguments, without where the weights come from: what a sidecar keeps."""
    return {"name": config.name, "num_classes": config.num_classes, **config.kwargs}


class FloatModel(NamedTuple):
    """A float model, its preprocessing, and the SHA-256 of the file that its weights were read from."""

    model: Any
    preprocessing: Preprocessing
    sha256: str | None


def build_float_model(config: ModelConfig, preprocessing: dict[str, Any]) -> FloatModel:
    """The float model of a config, with its weights.

    Args:
        preprocessing: settings over the model's own.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a setting is wrong, or the weights are another model's or cannot be downloaded.
    """
    path = None if config.checkpoint is None else Path(config.checkpoint)
    model = build_model(pretrained=config.pretrained and path is None, **model_arguments(config))
    digest = None if path is None else _load(model, config.name, path)
    adapted_to = adapted(family_of(config.name).preprocessing(model), preprocessing)
    if input_size(model) not in (None, adapted_to.size):
        taken = f"model {config.name} takes {input_size(model)}"
        raise ValueError(f"data.preprocessing.size is {adapted_to.size}, but {taken}; set model.kwargs.img_size too")
    return FloatModel(model, adapted_to, digest)


def _load(model: Any, name: str, path: Path) -> str:
    """Loads a file of weights, which is read once; returns its SHA-256. Raises as `load_weights` does."""
    data = read_content(path)
    load_weights(model, family_of(name), path, data)
    return hashlib.sha256(data).hexdigest()


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
    unknown = [key for key in configured if key not in own]
    if unknown:
        raise ValueError(f"data.preprocessing.{unknown[0]} is not known; the keys are {', '.join(own)}")
    size = configured.get("size", own["size"])
    size = [size, size] if isinstance(size, int) else size
    return validate({**own, **configured, "size": size}, Preprocessing, "data.preprocessing")
