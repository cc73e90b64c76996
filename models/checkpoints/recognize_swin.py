"""Which Swin or Swin V2 a checkpoint is of, by its tensors: timm's name, and settings where it implies others."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from qswin.models.checkpoints.architectures import Recognized, classes_of
from qswin.models.checkpoints.layouts import window_of
from qswin.models.checkpoints.weights import Weights

SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
S3_WINDOWS = {"tiny": [7, 7, 14, 7], "small": [14, 14, 14, 7]}
BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."


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

    @property
    def size(self) -> str | None:
        """tiny, small, base or large; None of another embedding or other depths."""
        return SIZES.get((self.embed_dim, self.depths))

    def settings(self) -> dict[str, Any]:
        """timm's settings that a name of the usual sizes need not say."""
        usual = tuple(self.embed_dim // 32 << stage for stage in range(len(self.depths)))
        known = self.size is not None and self.num_heads == usual and self.patch_size == 4
        sizes = {"patch_size": self.patch_size, "embed_dim": self.embed_dim}
        lists = {"depths": list(self.depths), "num_heads": list(self.num_heads)}
        ratio = {} if self.mlp_ratio == 4 else {"mlp_ratio": self.mlp_ratio}
        bias = {} if self.qkv_bias else {"qkv_bias": False}
        return {**({} if known else sizes | lists), **ratio, **bias}


def recognize_swin(weights: Weights, names: Collection[str]) -> Recognized:
    """Of a Swin or Swin V2. A V1's tables tell its windows; V2's do not, and image sizes are told by few files."""
    shape = SwinShape.of(weights.state)
    told = {**weights.told, **weights.settings}
    assumed: list[str] = []
    windows = _windows(shape, weights.state, told, assumed)
    side = _image_side(shape, windows[-1], told, assumed)
    name = _published_name(shape, windows, max(side) if isinstance(side, list | tuple) else side, told)
    settings = shape.settings()
    if name not in names or shape.size is None:
        name = _nearest_name(shape, names)
        settings |= {"img_size": side, "window_size": windows[0] if len(set(windows)) == 1 else windows}
    return Recognized(name, classes_of(weights, "head.fc.weight"), settings, tuple(assumed))


def _windows(shape: SwinShape, state: Mapping[str, Tensor], told: dict[str, Any], assumed: list[str]) -> list[Any]:
    """The window of each stage, or of all; what is not told is added to `assumed`."""
    if "window_size" in told:
        return [told["window_size"]]
    if not shape.v2:
        return window_of(state)
    window = 12 if shape.size == "large" else 8
    assumed.append(f"windows of {window}, which no tensor of a Swin V2 tells (model.kwargs.window_size)")
    return [window]


def _image_side(shape: SwinShape, window: int, told: dict[str, Any], assumed: list[str]) -> Any:
    """What is told, or: in V1 that of images whose last feature map is one window; in V2 what was published."""
    if "img_size" in told:
        return told["img_size"]
    side = window * shape.patch_size << (len(shape.depths) - 1)
    if shape.v2 and shape.patch_size == 4:
        side = {12: 192, 24: 384}.get(window, 256)
    assumed.append(f"images of {side} x {side}, which no tensor tells (model.kwargs.img_size)")
    return side


def _published_name(shape: SwinShape, windows: list[Any], side: int, told: dict[str, Any]) -> str:
    """What timm would call a model of these windows; nothing where they are mixed otherwise than in its own."""
    size, window, pretrained = shape.size or "tiny", windows[0], told.get("pretrained_window_sizes")
    if S3_WINDOWS.get(size) == windows:
        return f"swin_s3_{size}_{side}"
    if len(set(windows)) > 1:
        return ""
    if not shape.v2:
        return f"swin_{size}_patch4_window{window}_{side}"
    if pretrained and pretrained[0] not in (0, window):
        return f"swinv2_{size}_window{pretrained[0]}to{window}_{pretrained[0] * 16}to{side}"
    return f"swinv2_{size}_window{window}_{side}"


def _nearest_name(shape: SwinShape, names: Collection[str]) -> str:
    """One of the model's size, whose windows and images are others."""
    size = shape.size or "tiny"
    name = f"swinv2_{size}_window8_256" if shape.v2 else f"swin_{size}_patch4_window7_224"
    return name if name in names else min(each for each in names if each.startswith(name.split("_window")[0]))
