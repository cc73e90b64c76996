"""Which architecture a checkpoint is of, by its tensors alone: timm's name, and settings where it implies others."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from qswin.models.checkpoints.layouts import window_of
from qswin.models.checkpoints.weights import Weights

SWIN_SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
S3_WINDOWS = {"tiny": [7, 7, 14, 7], "small": [14, 14, 14, 7]}
VIT_SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large"}
BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."


@dataclasses.dataclass(frozen=True)
class Recognized:
    """What a checkpoint is of.

    Args:
        name: of the model.
        num_classes: None where the checkpoint has no head that can be had.
        settings: of the architecture, over those of the name; what the weights ask for is not among them.
        assumed: a sentence for each thing that no tensor tells.
    """

    name: str
    num_classes: int | None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()


Recognize = Callable[[Weights], Recognized]


@dataclasses.dataclass(frozen=True)
class SwinShape:
    """What the tensors of a Swin tell."""

    embed_dim: int
    patch_size: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    qkv_bias: bool
    v2: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "SwinShape":
        embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        blocks = {tuple(map(int, match.groups())) for match in map(re.compile(BLOCK).match, state) if match}
        depths = [sum(stage == index for stage, _ in blocks) for index in range(1 + max(stage for stage, _ in blocks))]
        v2 = "layers.0.blocks.0.attn.logit_scale" in state
        key, axis = ("logit_scale", 0) if v2 else ("relative_position_bias_table", 1)
        heads = [state[f"layers.{index}.blocks.0.attn.{key}"].shape[axis] for index in range(len(depths))]
        ratio = state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim
        bias = f"layers.0.blocks.0.attn.{'q_bias' if v2 else 'qkv.bias'}" in state
        return cls(embed_dim, patch_size, tuple(depths), tuple(heads), ratio, bias, v2)

    def settings(self) -> dict[str, Any]:
        """timm's settings that a name of the usual sizes need not say."""
        usual = tuple(self.embed_dim // 32 << stage for stage in range(len(self.depths)))
        known = (self.embed_dim, self.depths) in SWIN_SIZES and self.num_heads == usual and self.patch_size == 4
        sizes = {"patch_size": self.patch_size, "embed_dim": self.embed_dim}
        lists = {"depths": list(self.depths), "num_heads": list(self.num_heads)}
        ratio = {} if self.mlp_ratio == 4 else {"mlp_ratio": self.mlp_ratio}
        bias = {} if self.qkv_bias else {"qkv_bias": False}
        return {**({} if known else sizes | lists), **ratio, **bias}


def recognize_swin(weights: Weights, names: Collection[str]) -> Recognized:
    """Of a Swin or Swin V2. A V1's tables tell its windows; V2's do not, and image sizes are told by few files."""
    shape = SwinShape.of(weights.state)
    told = {**weights.told, **weights.settings}
    windows = [told["window_size"]] if "window_size" in told else [] if shape.v2 else window_of(weights.state)
    settings, assumed = shape.settings(), []
    size = SWIN_SIZES.get((shape.embed_dim, shape.depths), "tiny")
    if not windows:
        windows = [12 if size == "large" else 8]
        assumed.append(f"windows of {windows[0]}, which no tensor of a Swin V2 tells (model.kwargs.window_size)")
    side, window = told.get("img_size"), windows[0]
    if side is None:
        side = _usual_side(shape, windows[-1])
        assumed.append(f"images of {side} x {side}, which no tensor tells (model.kwargs.img_size)")
    base = _swin_name(shape.v2, size, windows, _square(side), told.get("pretrained_window_sizes"))
    if base in names and (shape.embed_dim, shape.depths) in SWIN_SIZES:
        return Recognized(base, _classes(weights, "head.fc.weight"), settings, tuple(assumed))
    base = f"swinv2_{size}_window8_256" if shape.v2 else f"swin_{size}_patch4_window7_224"
    base = base if base in names else next(name for name in sorted(names) if name.startswith(base.split("_window")[0]))
    sizes = {"img_size": side, "window_size": window if len(set(windows)) == 1 else windows}
    return Recognized(base, _classes(weights, "head.fc.weight"), {**settings, **sizes}, tuple(assumed))


def _usual_side(shape: SwinShape, window: int) -> int:
    """Of images whose last feature map is one window in V1; in V2, whose windows grew, what was published."""
    if shape.v2 and shape.patch_size == 4:
        return {12: 192, 24: 384}.get(window, 256)
    return window * shape.patch_size << (len(shape.depths) - 1)


def _square(side: Any) -> int:
    return max(side) if isinstance(side, list | tuple) else side


def _swin_name(v2: bool, size: str, windows: list[int], side: int, pretrained: list[int] | None) -> str:
    """What timm would call a model of these windows; nothing where they are mixed otherwise than in its own."""
    window = windows[0]
    if S3_WINDOWS.get(size) == windows:
        return f"swin_s3_{size}_{side}"
    if len(set(windows)) > 1:
        return ""
    if not v2:
        return f"swin_{size}_patch4_window{window}_{side}"
    if pretrained and pretrained[0] not in (0, window):
        return f"swinv2_{size}_window{pretrained[0]}to{window}_{pretrained[0] * 16}to{side}"
    return f"swinv2_{size}_window{window}_{side}"


def _classes(weights: Weights, head: str) -> int | None:
    return None if weights.headless or head not in weights.state else len(weights.state[head])


def recognize_vit(weights: Weights, names: Collection[str]) -> Recognized:
    """Of a ViT or DeiT: the timm model of its width whose tensors have its names, plain ones first.

    Raises:
        ValueError: timm's models have none like it.
    """
    state = weights.state
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match)
    kind = r"deit_\w+_distilled" if "head_dist.weight" in state else r"(vit|deit3?)_(?!.*distilled)\w+"
    heads = _vit_heads(width, weights)
    size = VIT_SIZES.get(width, "tiny")
    candidates = sorted(
        (name for name in names if re.match(kind, name) and f"_{size}_" in name and f"_patch{patch}_" in name),
        key=lambda name: (not name.startswith("vit"), len(name), name),
    )
    settings: dict[str, Any] = {"patch_size": patch, "embed_dim": width, "depth": depth}
    base = next((name for name in candidates if _has_names(name, depth, weights)), None)
    usual = width in VIT_SIZES and depth == (24 if size == "large" else 12) and base is not None
    if base is None:
        base = f"deit_{size}_distilled_patch16_224" if "head_dist.weight" in state else f"vit_{size}_patch16_224"
        if not _has_names(base, depth, weights):
            raise ValueError("a ViT with parts that none of timm's models of its size has; docs/models.md lists them")
    assumed = []
    if heads is not None:
        assumed.append(f"{heads} heads of {width // heads}, which no tensor tells (model.kwargs.num_heads)")
        settings["num_heads"] = heads
    if weights.preprocessing_from is None:
        assumed.append(
            "mean and std of the model's own: 0.5 for vit_*, ImageNet's for deit_*, which has the same tensors"
            " (data.preprocessing.mean and .std)"
        )
    sides = {} if "img_size" in weights.settings else _side(base, patch, state)
    kept = {} if usual else settings
    return Recognized(base, _classes(weights, "head.weight"), {**kept, **sides}, tuple(assumed))


def _vit_heads(width: int, weights: Weights) -> int | None:
    """The number of heads that timm's models of a width have; None where the weights say theirs.

    Raises:
        ValueError: they do not, and timm has no model of the width here.
    """
    if "num_heads" in weights.settings:
        return None
    if width not in VIT_SIZES:
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
