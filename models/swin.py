"""Swin V1 and V2, as timm implements them: classifiers, and their stages as backbones."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import timm
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from qswin.models import timm_models
from qswin.models.backbones.backbone import Backbone
from qswin.models.backbones.windows import SHRINK, set_padding
from qswin.models.checkpoints.libraries import huggingface, openmmlab, published, torchvision
from qswin.models.checkpoints.recognize_swin import recognize_swin
from qswin.models.family import Family
from qswin.models.timm_models import FIXED, PATCH_EMBED, preprocessing
from qswin.models.timm_models import SETTINGS as TIMM_SETTINGS


def names() -> list[str]:
    """timm's names of these models; swinv2_cr is another implementation, which is not supported."""
    return [name for name in timm.list_models() if re.match(r"swin(v2)?_(?!cr_)", name)]


class SwinBackbone(Backbone):
    """The stages of timm's Swin, with the names that its parameters have there."""

    def __init__(self, swin: Any, out_features: Sequence[str], feature_norms: bool) -> None:
        channels = [info["num_chs"] for info in swin.feature_info]
        super().__init__(channels, [info["reduction"] for info in swin.feature_info], out_features, feature_norms)
        self.patch_embed, self.layers = swin.patch_embed, swin.layers[: self.last + 1]
        self.pretrained_cfg = swin.pretrained_cfg

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
            yield x


def build(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    padding: str = "timm",
    out_features: Sequence[str] | None = None,
    feature_norms: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm model, or a backbone of its stages.

    Args:
        padding: the library whose way to fill up incomplete windows is taken (models/backbones/windows.py).
        out_features: of a backbone, which takes images of any size: see `Backbone`. None makes a classifier.
        feature_norms: of a backbone, see `Backbone`.
        kwargs: see `timm_models.build`.

    Raises:
        ValueError: a setting is wrong.
    """
    if padding not in SHRINK:
        kwargs = {"always_partition": True, **kwargs}
    if out_features is not None:
        num_classes, kwargs = 0, {"strict_img_size": False, **kwargs}
    model: Any = timm_models.build(name, num_classes, pretrained, **kwargs)
    set_padding(model, padding)
    return model if out_features is None else SwinBackbone(model, out_features, feature_norms)


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state for this model: timm itself resizes patch embeddings and position biases of another size."""
    v2 = any(isinstance(module, swin_transformer_v2.SwinTransformerV2Block) for module in model.modules())
    return (swin_transformer_v2 if v2 else swin_transformer).checkpoint_filter_fn(_part_of(state, model), model)


def _part_of(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without what the model lacks by design: a backbone has no head, a classifier no norms of its feature maps."""
    if not isinstance(model, Backbone):
        return {key: value for key, value in state.items() if not re.match(r"norm\d\.", key)}
    unused = re.compile(rf"norm\.|head\.|layers\.(?!{'|'.join(map(str, range(model.last + 1)))}\.)")
    kept = {key: value for key, value in state.items() if not unused.match(key)}
    norms = {f"norm{model.names.index(name)}" for name in model.channels}
    return {key: value for key, value in kept.items() if not re.match(r"norm\d\.", key) or key.split(".")[0] in norms}


SETTINGS = (
    *TIMM_SETTINGS,
    *("depths", "window_size", "always_partition", "strict_img_size"),
    *("head_dim", "pretrained_window_sizes"),  # of V1, and of V2
    *("padding", "out_features", "feature_norms"),
)
FAMILY = Family(
    name="swin",
    task="classification",
    names=names,
    build=build,
    preprocessing=preprocessing,
    convert_state=convert_state,
    sources=(
        *(torchvision.SWIN, huggingface.SWIN, openmmlab.SWIN),
        *(published.ORIGINAL_SWIN, published.TIMM_SWIN),
    ),
    sites=(PATCH_EMBED, (r"(^|\.)head\.fc$", r"\1head")),
    recognize=lambda weights: recognize_swin(weights, names()),
    no_weight_decay=("relative_position_bias_table", "logit_scale"),
    fixed=FIXED,
    settings=SETTINGS,
)
