"""Swin of OpenMMLab: mmpretrain (and mmcls), mmdetection and mmsegmentation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qswin.models.checkpoints.layouts import (
    NO_ABSOLUTE_POSITIONS,
    feature_norms,
    next_stage,
    window_of,
    without_buffers,
)
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights

RENAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.", "layers."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
HEAD = "head.fc."
CROP = {"crop_pct": 224 / 256, "crop_mode": "center"}
CROPPED = "mmpretrain: resize 256, crop 224"


def read_swin(state: dict[str, Tensor], folder: Path) -> Weights:
    """A Swin V1: a classifier of mmpretrain, or the backbone of a detector or segmentor, without a head.

    Raises:
        ValueError: it is a Swin V2, or has absolute position embeddings.
    """
    if any(key.endswith(".w_msa.logit_scale") for key in state):
        raise ValueError("a Swin V2 of OpenMMLab, which is not read; take timm's or transformers' file of it")
    backbone = _to_timms(state)
    if "absolute_pos_embed" in backbone:
        raise ValueError(NO_ABSOLUTE_POSITIONS)
    head = {key: value for key, value in state.items() if key.startswith(HEAD)}
    settings: dict[str, Any] = {"window_size": window_of(backbone)[0]}
    settings |= {"padding": "mmpretrain"} if head else {"padding": "mmdetection", **feature_norms(backbone)}
    if not head:
        return Weights(backbone, "OpenMMLab", settings, headless="it is a detector's or segmentor's backbone")
    preprocessing = CROP if settings["window_size"] == 7 else {}
    return Weights({**backbone, **head}, "OpenMMLab", settings, preprocessing, CROPPED if preprocessing else None)


def _to_timms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, and in timm's order.

    A detector has a norm for each feature map, `norm0` and so on; a classifier reads the last, which is `norm` too.
    """
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if _is_backbones(key, state)}
    renamed = {rename(key, RENAMES): value for key, value in without_buffers(backbone).items()}
    last = max(int(key.split(".")[1]) for key in renamed if key.startswith("layers."))
    converted: dict[str, Tensor] = {}
    for key, value in renamed.items():
        name = next_stage(key)
        converted[name] = _unfold_order_to_timms(value) if ".downsample." in key else value
        if key.startswith(f"norm{last}."):
            converted[key.replace(f"norm{last}.", "norm.", 1)] = value
    return converted


def _is_backbones(key: str, state: Mapping[str, Tensor]) -> bool:
    """A whole model's backbone has a prefix; a backbone that was saved alone has none, and nothing else is there."""
    prefixed = any(other.startswith("backbone.stages.") for other in state)
    return key.startswith("backbone.") or not (prefixed or key.startswith(HEAD))


def _unfold_order_to_timms(value: Tensor) -> Tensor:
    """Patch merging's norm (4C,) or reduction (2C, 4C), whose last axis is in nn.Unfold's order.

    nn.Unfold orders what it cuts out by channel, row, column; timm orders it by column, row, channel.
    """
    *rows, columns = value.shape
    cut = value.reshape(*rows, columns // 4, 2, 2)
    return cut.transpose(-1, -3).reshape(value.shape)


SWIN = Source(r"(backbone\.)?stages\.0\.blocks\.0\.attn\.w_msa\.", read_swin)
