"""Which ViT or DeiT a checkpoint is of, by its tensors: timm's name, and settings where it implies others."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from qswin.models.checkpoints.architectures import Recognized, classes_of
from qswin.models.checkpoints.weights import Weights

SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large"}
STATISTICS = (
    "mean and std of the model's own: 0.5 for vit_*, ImageNet's for deit_*, which has the same tensors"
    " (data.preprocessing.mean and .std)"
)


def recognize_vit(weights: Weights, names: Collection[str]) -> Recognized:
    """Of a ViT or DeiT: the timm model of its width whose tensors have its names, plain ones first.

    Raises:
        ValueError: timm's models have none like it.
    """
    state = weights.state
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match)
    heads = _vit_heads(width, weights)
    size, distilled = SIZES.get(width, "tiny"), "head_dist.weight" in state
    found = _named_alike(names, size, patch, depth, weights)
    settings: dict[str, Any] = {}
    if width not in SIZES or depth != (24 if size == "large" else 12) or found is None:
        settings = {"patch_size": patch, "embed_dim": width, "depth": depth}
        settings |= {} if heads is None else {"num_heads": heads}
    name = found or _usual_name(size, distilled, depth, weights)
    sides = {} if "img_size" in weights.settings else _side(name, patch, state)
    return Recognized(name, classes_of(weights, "head.weight"), {**settings, **sides}, _assumed(width, heads, weights))


def _named_alike(names: Collection[str], size: str, patch: int, depth: int, weights: Weights) -> str | None:
    """The first of timm's models of a size and a patch whose tensors have the names of these; None without one."""
    kind = r"deit_\w+_distilled" if "head_dist.weight" in weights.state else r"(vit|deit3?)_(?!.*distilled)\w+"
    candidates = [name for name in names if re.match(kind, name) and f"_{size}_" in name and f"_patch{patch}_" in name]
    plain_first = sorted(candidates, key=lambda name: (not name.startswith("vit"), len(name), name))
    return next((name for name in plain_first if _has_names(name, depth, weights)), None)


def _usual_name(size: str, distilled: bool, depth: int, weights: Weights) -> str:
    """One of another patch, whose tensors have the names of these. Raises ValueError where they have not."""
    name = f"deit_{size}_distilled_patch16_224" if distilled else f"vit_{size}_patch16_224"
    if not _has_names(name, depth, weights):
        raise ValueError("a ViT with parts that none of timm's models of its size has; docs/models.md lists them")
    return name


def _assumed(width: int, heads: int | None, weights: Weights) -> tuple[str, ...]:
    told = () if weights.preprocessing_from is not None else (STATISTICS,)
    if heads is None:
        return told
    return f"{heads} heads of {width // heads}, which no tensor tells (model.kwargs.num_heads)", *told


def _vit_heads(width: int, weights: Weights) -> int | None:
    """The number of heads that timm's models of a width have; None where the weights say theirs.

    Raises:
        ValueError: they do not, and timm has no model of the width here.
    """
    if "num_heads" in weights.settings:
        return None
    if width not in SIZES:
        what = f"a ViT of width {width}, whose number of heads no tensor tells"
        raise ValueError(f"{what}; write a config for it, with model.kwargs.embed_dim, depth and num_heads")
    return width // 64


def _has_names(name: str, depth: int, weights: Weights) -> bool:
    """Whether timm's model has tensors of these names, apart from those of its head."""
    settings = {key: value for key, value in weights.settings.items() if key in ("reg_tokens", "qkv_bias")}
    with torch.device("meta"):
        model = timm.create_model(name, depth=depth, num_classes=1, **settings)
    heads = ("head.", "head_dist.")
    names = [{key for key in keys if not key.startswith(heads)} for keys in (model.state_dict(), weights.state)]
    before = [_before_patches(state) for state in (model.state_dict(), weights.state)]
    return names[0] == names[1] and before[0] == before[1]


def _before_patches(state: Mapping[str, Tensor]) -> int | None:
    """How many tokens the position embedding has before the patches', which are a square; None without one."""
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    found = (prefix for prefix in range(min(tokens, 6)) if math.isqrt(tokens - prefix) ** 2 == tokens - prefix)
    return next(found, None)


def _side(name: str, patch: int, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The image's side by the position embedding; nothing where the name says it, or there is none."""
    prefix = _before_patches(state)
    if prefix is None:
        return {}
    side = math.isqrt(state["pos_embed"].shape[1] - prefix) * patch
    return {} if name.endswith(f"_{side}") else {"img_size": side}
