"""ViT and DeiT, as timm implements them: tiny to large, any patch and image size, class-token or average pooling."""

import re

import timm
from timm.models import vision_transformer
from torch import Tensor, nn

from qswin.models.checkpoints.libraries import huggingface, published, torchvision
from qswin.models.checkpoints.recognize_vit import recognize_vit
from qswin.models.family import Family
from qswin.models.timm_models import FIXED, PATCH_EMBED, build, preprocessing
from qswin.models.timm_models import SETTINGS as TIMM_SETTINGS

# Other blocks, other attention, or a head that pools by attention, under the same prefix.
OTHERS = r"18x2|dinov3|lingbot|radio|rope|rpn|sapiens|siglip_\d|xp_"


def names() -> list[str]:
    """timm's names of the models that are made of its plain ViT blocks."""
    pattern = r"(vit|deit3?)_(tiny|small|medium|base|large)_(distilled_)?patch\d+_"
    return [name for name in timm.list_models() if re.match(pattern, name) and not re.search(OTHERS, name)]


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state for this model: timm itself converts those of the original repositories, and resizes positions."""
    assert isinstance(model, vision_transformer.VisionTransformer)
    return vision_transformer.checkpoint_filter_fn(state, model)


SETTINGS = (
    *TIMM_SETTINGS,
    *("depth", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "class_token", "pos_embed"),
    *("no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_pad"),
    *("pos_drop_rate", "patch_drop_rate", "norm_eps"),
)
FAMILY = Family(
    name="vit",
    task="classification",
    names=names,
    build=build,
    preprocessing=preprocessing,
    convert_state=convert_state,
    sources=(torchvision.VIT, huggingface.VIT, published.TIMM_VIT),
    recognize=lambda weights: recognize_vit(weights, names()),
    head=("head.", "head_dist."),
    sites=(PATCH_EMBED, (r"(^|\.)head_dist$", r"\1head.dist")),
    fixed=FIXED,
    settings=SETTINGS,
)
