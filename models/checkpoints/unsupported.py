"""Models that look as if they belonged here and do not: refused by name, with the reason and what comes nearest."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Unsupported(NamedTuple):
    """A kind of model that is refused.

    Args:
        kind: its name, as people know it.
        reason: why it is not supported, and the nearest thing that works.
        names: a pattern that the names of such models match from their start; "" matches none.
        keys: a pattern that a key of its checkpoints matches, anywhere; "" matches none.
    """

    kind: str
    reason: str
    names: str
    keys: str


SWIN = "swin_tiny_patch4_window7_224"
VIT = "vit_base_patch16_224"
KINDS = (
    Unsupported(
        "MaxViT",
        f"its blocks (MBConv, grid attention) have no quantized twins; the nearest that works is {SWIN}",
        r"(maxvit|maxxvit|coatnet)",
        r"(\.attn_block\.rel_pos\.|\.layers\.MBconv\.|\.attn_grid\.)",
    ),
    Unsupported(
        "swinv2_cr",
        "its attention is another than Swin V2's; the nearest that works is swinv2_tiny_window8_256",
        r"swin(v2)?_cr_",
        r"\.attn\.meta_mlp\.",
    ),
    Unsupported(
        "Swin3D",
        f"videos and volumes have three-dimensional windows; for single images take {SWIN}",
        r"(swin_?3d|video_?swin|swin_?unetr)",
        r"^swinViT\.",
    ),
    Unsupported(
        "SwinIR",
        "it restores images, and classifiers and segmentation models are quantized here;"
        " the nearest that works is swin_unet_tiny_patch4_window7_224",
        r"(swin_?ir|swin2_?sr|hat_)",
        r"\.residual_group\.",
    ),
    Unsupported(
        "Swin-MLP",
        f"it has no attention, and its blocks have no quantized twins; the nearest that works is {SWIN}",
        r"swin_?mlp",
        r"\.spatial_mlp\.",
    ),
    Unsupported(
        "DINOv3",
        f"its position embedding is rotary (rope), which has no quantized twin; the nearest that works is {VIT}",
        r".*(dinov3|_rope_|^rope)",
        r"(^|\.)rope(_embed(dings)?)?\.|^layer\.0\.attention\.q_proj\.",
    ),
    Unsupported(
        "BEiT",
        f"it adds position biases in its attention, which has no quantized twin; the nearest that works is {VIT}",
        r"(beit|eva)",
        r"^blocks\.0\.attn\.(relative_position_bias_table|q_bias)$|^beit\.|^rel_pos_bias\.",
    ),
    Unsupported(
        "A ViT of parallel blocks",
        f"its blocks have no quantized twins; the nearest that works is {VIT}",
        r"vit_.*(18x2|parallel)",
        r"^blocks\.0\.attns\.",
    ),
)


def why_unsupported(name: str) -> str | None:
    """Why a model of this name is refused, and what comes nearest; None where that is not known."""
    return next((f"{kind.kind} is not supported: {kind.reason}" for kind in KINDS if re.match(kind.names, name)), None)


def refuse_unsupported(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a checkpoint of one of these models."""
    kind = next((kind for kind in KINDS if any(re.search(kind.keys, key) for key in state)), None)
    if kind is None and any(key.endswith(".proj.weight") and value.ndim == 5 for key, value in state.items()):
        kind = next(kind for kind in KINDS if kind.kind == "Swin3D")
    if kind is not None:
        raise ValueError(f"a checkpoint of {kind.kind}, which is not supported: {kind.reason}")
