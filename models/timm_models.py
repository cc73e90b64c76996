"""What timm's families have in common: how a model is built, its preprocessing, the settings that do not work here."""

import inspect
from collections.abc import Iterable
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

# The settings of timm's models that timm takes and that end in an error later: in calibration, or in exporting.
FIXED = {
    "in_chans": (3, "images have three channels"),
    "features_only": (False, "out_features makes a backbone, see docs/backbones.md"),
}
# What timm's transformers have in common: data, which choose no file, address, device or code.
SETTINGS = (
    *("img_size", "patch_size", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "global_pool", "dynamic_img_size"),
    *("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)
PATCH_EMBED = (r"(^|\.)patch_embed\.proj$", r"\1patch_embed")  # of Family.sites


def build(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    norm_eps: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model.

    Args:
        norm_eps: of all LayerNorms, for weights of a library with another than timm's; None leaves timm's.
        kwargs: timm's (img_size, drop_path_rate, ...).

    Raises:
        ValueError: the epsilon is not above 0.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    _check_names(model, kwargs)
    if norm_eps is not None:
        _set_norm_eps(name, model, norm_eps)
    return model


def _set_norm_eps(name: str, model: nn.Module, norm_eps: Any) -> None:
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise ValueError(f"model {name!r}: norm_eps={norm_eps!r} is not a number above 0 and below 1")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = norm_eps


def _check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Raises TypeError for a setting that changed nothing: timm before 1.0.31 takes any name for a Swin."""
    parameters = inspect.signature(type(model)).parameters
    bases = [inspect.signature(base).parameters for base in type(model).__mro__ if issubclass(base, nn.Module)]
    known = set().union(*bases, inspect.signature(timm.create_model).parameters)
    unknown = set(names) - known
    if unknown and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise TypeError(f"{type(model).__name__} got an unexpected keyword argument {min(unknown)!r}")


def preprocessing(model: Any) -> dict[str, Any]:
    """The preprocessing in the model's own configuration; keys as qswin.calib.data.images.Preprocessing."""
    config = resolve_data_config(model=model)
    side = model.patch_embed.img_size or config["input_size"][1:]
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {"size": tuple(side), **{key: config[key] for key in keys}}
