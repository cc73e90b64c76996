"""timm's own layout, and that of the original repositories, which timm had before 0.9 too."""

import re
from pathlib import Path

from torch import Tensor

from qswin.models.checkpoints.layouts import next_stage, without_buffers
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights

PRE_LOGITS = "its head reads a pre-logits layer, which timm's models no longer have"


def read_original_swin(state: dict[str, Tensor], folder: Path) -> Weights:
    """Microsoft's Swin and Swin V2, or timm's before 0.9; with `backbone.` before it, a detector's of their forks.

    Raises:
        ValueError: it has absolute position embeddings.
    """
    last = max(int(key.split(".")[1]) for key in _backbone(state) if key.startswith("layers."))
    renames = ((rf"^norm{last}\.", "norm."), (r"^head\.(?!fc\.)", "head.fc."))
    converted = {next_stage(rename(key, renames)): value for key, value in without_buffers(_backbone(state)).items()}
    if "absolute_pos_embed" in converted:
        raise ValueError("a Swin with absolute position embeddings (ape), which is not supported; train it without")
    if any(key.startswith("backbone.") for key in state):
        kept = {key: value for key, value in converted.items() if not re.match(r"norm\d", key)}  # one of a lower stage
        return Weights(kept, "the original repository", headless="it is a detector's or segmentor's backbone")
    return Weights(converted, "the original repository")


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


ORIGINAL_SWIN = Source(r"(backbone\.)?layers\.0\.downsample\.", read_original_swin)
TIMM_SWIN = Source(r"layers\.0\.blocks\.0\.attn\.", read_timm)
TIMM_VIT = Source(r"blocks\.0\.attn\.|(module\.)?visual\.", read_vit)
