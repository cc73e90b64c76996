"""Swin-Unet: a U-Net made of Swin V1 blocks, for segmentation (Cao et al., "Swin-Unet", ECCV workshops 2022).

The state-dict names are those of the published code, so its checkpoints load. Blocks and patch merging are timm's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from qswin.models.backbones.backbone import Backbone
from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.weights import Source, Weights
from qswin.models.family import Family
from qswin.models.timm_models import PATCH_EMBED

NAMES = {"swin_unet_tiny_patch4_window7_224": {"img_size": 224, "embed_dim": 96, "window_size": 7}}


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, H / patch_size, W / patch_size, dim)."""

    def __init__(self, img_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchExpand(nn.Module):
    """Each token becomes scale x scale tokens: (B, H, W, C) -> (B, scale * H, scale * W, out_dim)."""

    def __init__(self, dim: int, scale: int, out_dim: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = self.expand(x).reshape(batch, height, width, self.scale, self.scale, -1)
        x = x.transpose(2, 3).reshape(batch, height * self.scale, width * self.scale, -1)
        return self.norm(x)


class SkipProjection(nn.Linear):
    """Joins the decoder's tokens with the encoder's and projects them: two of (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        return super().forward(torch.cat((x, skip), dim=-1))


def blocks(dim: int, side: int, heads: int, window: int, drop_path: Sequence[float], **kwargs: Any) -> nn.Sequential:
    """Swin blocks over side x side tokens, every second one shifted."""
    return nn.Sequential(
        *(
            SwinTransformerBlock(
                dim, to_2tuple(side), heads, None, window, window // 2 * (i % 2), drop_path=rate, **kwargs
            )
            for i, rate in enumerate(drop_path)
        )
    )


class EncoderStage(nn.Module):
    """Blocks, then half the resolution with twice the channels (not after the last stage)."""

    def __init__(self, body: nn.Sequential, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.downsample = body, downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class DecoderStage(nn.Module):
    """Blocks, then twice the resolution with half the channels (not after the last stage)."""

    def __init__(self, body: nn.Sequential, upsample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.upsample = body, upsample

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.blocks(x))


class SwinUnet(nn.Module):
    """(B, 3, img_size, img_size) -> class logits of every pixel, (B, num_classes, img_size, img_size).

    As in the published code, the decoder mirrors the encoder: stage i of it has as many blocks as the encoder's at the
    same resolution, and the lowest resolution has the encoder's only.

    Args:
        depths: blocks of each encoder stage.
        num_heads: attention heads of each encoder stage.
        drop_path_rate: of the deepest block; it grows linearly from 0.
    """

    def __init__(
        self,
        num_classes: int = 9,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        last = len(depths) - 1
        side = img_size // patch_size
        if img_size % (patch_size << last):
            raise ValueError(f"img_size {img_size}: {len(depths)} stages need a multiple of {patch_size << last}")
        self.num_classes = num_classes
        rates = [rates.tolist() for rates in torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))]

        def body(stage: int) -> nn.Sequential:
            heads = num_heads[stage]
            kwargs = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
            return blocks(embed_dim << stage, side >> stage, heads, window_size, rates[stage], **kwargs)

        dims = [embed_dim << stage for stage in range(len(depths))]
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        down = [PatchMerging(dim) for dim in dims[:-1]] + [nn.Identity()]
        self.layers = nn.ModuleList(EncoderStage(body(stage), down[stage]) for stage in range(len(depths)))
        self.norm = nn.LayerNorm(dims[-1])
        mirrored = range(last - 1, -1, -1)
        up = [PatchExpand(dims[stage], 2, dims[stage] // 2) if stage else nn.Identity() for stage in range(last + 1)]
        self.layers_up = nn.ModuleList([up[last], *(DecoderStage(body(stage), up[stage]) for stage in mirrored)])
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *(SkipProjection(dims[stage]) for stage in mirrored)])
        self.norm_up = nn.LayerNorm(embed_dim)
        self.up = PatchExpand(embed_dim, patch_size, embed_dim)
        self.output = nn.Conv2d(embed_dim, num_classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        skips = []
        for stage in self.layers:
            skips.append(x)
            x = stage(x)
        x = self.layers_up[0](self.norm(x))
        for stage, join, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], skips[-2::-1], strict=True):
            x = stage(join(x, skip))
        x = self.up(self.norm_up(x))
        return self.output(x.permute(0, 3, 1, 2))


class SwinUnetEncoder(Backbone):
    """The encoder of a Swin-Unet, which gives what its decoder joins: each stage's tokens before they are merged."""

    def __init__(self, unet: SwinUnet, out_features: Sequence[str], feature_norms: bool) -> None:
        embed: Any = unet.patch_embed
        dim, stages = embed.proj.out_channels, range(len(unet.layers))
        strides = [embed.proj.stride[0] << stage for stage in stages]
        super().__init__([dim << stage for stage in stages], strides, out_features, feature_norms)
        self.patch_embed, self.layers = embed, unet.layers[: self.last + 1]
        self.layers[self.last].downsample = nn.Identity()
        for module in self.modules():
            if isinstance(module, SwinTransformerBlock):
                module.dynamic_mask = True

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        stage: Any
        for stage in self.layers:
            x = stage.blocks(x)
            yield x
            x = stage.downsample(x)


def names() -> list[str]:
    """The published model's name; other sizes are settings of it."""
    return list(NAMES)


def build(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    out_features: Sequence[str] | None = None,
    feature_norms: bool = False,
    **kwargs: Any,
) -> SwinUnet | SwinUnetEncoder:
    """A Swin-Unet, or, where `out_features` are named, its encoder as a backbone, see `Backbone`.

    Args:
        kwargs: SwinUnet's.

    Raises:
        ValueError: for `pretrained`, since nobody hosts its weights, and for a wrong setting.
    """
    if pretrained:
        raise ValueError(f"{name} has no published weights to download; give model.checkpoint=FILE")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    unet = SwinUnet(**{**NAMES[name], **classes, **kwargs})
    return unet if out_features is None else SwinUnetEncoder(unet, out_features, feature_norms)


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state under our names: the published code wraps its model as `swin_unet`, and stores masks and indices."""
    state = {key.removeprefix("swin_unet."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith(("relative_position_index", "attn_mask"))}
    if not isinstance(model, Backbone):
        return state
    last = f"layers.{model.last}.downsample."
    return {key: value for key, value in state.items() if key in model.state_dict() and not key.startswith(last)}


def read(state: dict[str, Tensor], folder: Path) -> Weights:
    """The published code's weights, as they are."""
    return Weights(state, "the original repository")


def recognize(weights: Weights) -> Recognized:
    """The published model. Raises ValueError for half a checkpoint."""
    head = next((value for key, value in weights.state.items() if key.endswith("output.weight")), None)
    if head is None:
        raise ValueError("not a whole checkpoint: output.weight is missing; save model.state_dict()")
    assumed = "images of 224 x 224 and blocks of the published model (model.kwargs)"
    return Recognized(next(iter(NAMES)), len(head), assumed=(assumed,))


def preprocessing(model: Any) -> dict[str, Any]:
    """As the published code prepares its slices: values in [0, 1]; a config may say otherwise."""
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    size = model.patch_embed.img_size
    return {"size": size, "mean": zero, "std": one, "interpolation": "bicubic", "crop_pct": 1.0}


SETTINGS = (
    *("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size"),
    *("mlp_ratio", "qkv_bias", "drop_path_rate", "out_features", "feature_norms"),
)
FAMILY = Family(
    name="swin-unet",
    task="segmentation",
    names=names,
    build=build,
    preprocessing=preprocessing,
    convert_state=convert_state,
    sources=(Source(r"(swin_unet\.)?layers_up\.", read),),
    recognize=recognize,
    head=("output.",),
    sites=(PATCH_EMBED, (r"^output$", "head")),
    no_weight_decay=("relative_position_bias_table",),
    settings=SETTINGS,
)
