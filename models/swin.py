"""Swin V1 and V2, as timm implements them."""

import re
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

TASK = "classification"


def names() -> list[str]:
    """timm's names of these models; swinv2_cr is another implementation, which is not supported."""
    return [name for name in timm.list_models() if re.match(r"swin(v2)?_(?!cr_)", name)]


def build(name: str, num_classes: int | None = None, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm model; `kwargs` are timm's (img_size, window_size, drop_path_rate, ...)."""
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state under timm's names: checkpoints of the original Swin repository are renamed and resized by timm itself."""
    family = swin_transformer_v2 if isinstance(model, swin_transformer_v2.SwinTransformerV2) else swin_transformer
    return family.checkpoint_filter_fn(state, model)


def preprocessing(model: Any) -> dict[str, Any]:
    """The preprocessing in the model's own configuration; keys as calib.images.Preprocessing."""
    config = resolve_data_config(model=model)
    side = model.patch_embed.img_size or config["input_size"][1:]
    keys = ("mean", "std", "interpolation", "crop_pct")
    return {"size": tuple(side), **{key: config[key] for key in keys}}
