"""The float model that a config describes."""

import math
from collections.abc import Callable
from typing import Any

from qswin.calib.data.images import RESAMPLING, Preprocessing
from qswin.models.registry import build_model, family_of
from qswin.qat.schema import ModelConfig

CHANNELS = 3  # of images, read as RGB


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """build_model's arguments, without where the weights come from: what a sidecar keeps."""
    return {"name": config.name, "num_classes": config.num_classes, **config.kwargs}


def build_float_model(config: ModelConfig, preprocessing: dict[str, Any]) -> tuple[Any, Preprocessing]:
    """The float model of a config, with its weights, and its preprocessing.

    Args:
        preprocessing: settings over the model's own.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a setting is wrong, or the weights are another model's or cannot be downloaded.
    """
    model = build_model(checkpoint=config.checkpoint, pretrained=config.pretrained, **model_arguments(config))
    return model, adapted(family_of(config.name).preprocessing(model), preprocessing)


def adapted(own: dict[str, Any], configured: dict[str, Any]) -> Preprocessing:
    """A model's own preprocessing under what a config sets of it. One number as `size` is the side of a square.

    Raises:
        ValueError: a key is not known, or a value cannot be used; the key is named.
    """
    for key, value in configured.items():
        if key not in own:
            raise ValueError(f"data.preprocessing.{key} is not known; the keys are {', '.join(own)}")
        check_preprocessing(key, value)
    size = configured.get("size", own["size"])
    try:
        return Preprocessing(**{**own, **configured, "size": (size, size) if isinstance(size, int) else size})
    except ValueError as error:
        raise ValueError(f"data.preprocessing: {error}") from error


def check_preprocessing(key: str, value: Any) -> None:
    """Raises ValueError, naming the key, for a value that preprocessing cannot use."""
    allowed, what = ALLOWED[key]
    if not allowed(value):
        raise ValueError(f"data.preprocessing.{key}={value}: give {what}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_colour(value: Any, above: float = -math.inf) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == CHANNELS and all(map(_is_number, value))
    return numbers and all(part > above for part in value)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    return _is_side(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value)))


ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {  # of each key: what it may be, and that in words
    "size": (_is_size, "a number of pixels, or [HEIGHT, WIDTH]"),
    "mean": (_is_colour, "three numbers, of red, green and blue in [0, 1]"),
    "std": (lambda value: _is_colour(value, above=0), "three numbers above 0, of red, green and blue"),
    "interpolation": (lambda value: isinstance(value, str) and value in RESAMPLING, f"one of {', '.join(RESAMPLING)}"),
    "crop_pct": (lambda value: _is_number(value) and value > 0, "a number above 0"),
}
