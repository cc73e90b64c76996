"""Swin V1 and V2, as timm implements them."""

import re

import timm
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from qswin.models.checkpoints.libraries import huggingface, openmmlab, published, torchvision
from qswin.models.checkpoints.recognize_swin import recognize_swin
from qswin.models.family import Family
from qswin.models.timm_models import FIXED, PATCH_EMBED, build, preprocessing
from qswin.models.timm_models import SETTINGS as TIMM_SETTINGS


def names() -> list[str]:
    """timm's names of these models; swinv2_cr is another implementation, which is not supported."""
    return [name for name in timm.list_models() if re.match(r"swin(v2)?_(?!cr_)", name)]


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state for this model: timm itself resizes patch embeddings and position biases of another size."""
    family = swin_transformer_v2 if isinstance(model, swin_transformer_v2.SwinTransformerV2) else swin_transformer
    return family.checkpoint_filter_fn(state, model)


SETTINGS = (
    *TIMM_SETTINGS,
    *("depths", "window_size", "always_partition", "strict_img_size"),
    *("head_dim", "pretrained_window_sizes"),  # of V1, and of V2
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
