"""timm's own layout, and that of the original repositories, which timm had before 0.9 too."""

import math
import re
from pathlib import Path

from torch import Tensor

from qswin.models.checkpoints.layouts import NO_ABSOLUTE_POSITIONS, next_stage, without_buffers
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights

ORIGINAL = "the original repository"
PRE_LOGITS = "its head reads a pre-logits layer, which timm's models no longer have"


def read_original_swin(state: dict[str, Tensor], folder: Path) -> Weights:
    """Microsoft's Swin and Swin V2, or timm's before 0.9; with `backbone.` before it, a detector's of their forks.

    Raises:
        ValueError: it has absolute position embeddings.
    """
    told = _told(_backbone(state))
    last = max(int(key.split(".")[1]) for key in _backbone(state) if key.startswith("layers."))
    renames = ((rf"^norm{last}\.", "norm."), (r"^head\.(?!fc\.)", "head.fc."))
    converted = {next_stage(rename(key, renames)): value for key, value in without_buffers(_backbone(state)).items()}
    if "absolute_pos_embed" in converted:
        raise ValueError(NO_ABSOLUTE_POSITIONS)
    if any(key.startswith("backbone.") for key in state):
        kept = {key: value for key, value in converted.items() if not re.match(r"norm\d", key)}  # one of a lower stage
        return Weights(kept, ORIGINAL, told=told, headless="it is a detector's or segmentor's backbone")
    return Weights(converted, ORIGINAL, told=told)


def _told(state: dict[str, Tensor]) -> dict[str, int]:
    """The window of a Swin V2 and the image's side, by the buffers that the original repository stores."""
    told: dict[str, int] = {}
    if (table := state.get("layers.0.blocks.0.attn.relative_coords_table")) is not None:
        told["window_size"] = (table.shape[1] + 1) // 2
    if (mask := state.get("layers.0.blocks.1.attn_mask")) is not None:
        patch, side = state["patch_embed.proj.weight"].shape[-1], math.isqrt(mask.shape[0] * mask.shape[1])
        told["img_size"] = side * patch
    return told


def _backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone."
    inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inner or state


def read_timm(state: dict[str, Tensor], folder: Path) -> Weights:
    """timm's, as it is."""
    return Weights(without_buffers(state), "timm")


def read_vit(state: dict[str, Tensor], folder: Path) -> Weights:
    """timm's ViTs and DeiTs, which are the original repositories' too: DeiT III calls its layer scales `gamma_1`."""
    renamed = {rename(key, ((r"\.gamma_([12])$", r".ls\1.gamma"),)): value for key, value in state.items()}
    kept = {key: value for key, value in renamed.items() if not key.startswith("pre_logits.")}
    return Weights(kept, "timm", headless=PRE_LOGITS if len(kept) < len(renamed) else None)


UNET = r"(swin_unet\.)?layers_up\."
ORIGINAL_SWIN = Source(r"(backbone\.)?layers\.0\.downsample\.", read_original_swin, unless=UNET)
TIMM_SWIN = Source(r"layers\.0\.blocks\.0\.attn\.", read_timm, unless=UNET)
TIMM_VIT = Source(r"blocks\.0\.attn\.|(module\.)?visual\.", read_vit)
