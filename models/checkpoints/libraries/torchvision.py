"""torchvision's Swin, Swin V2 and ViT: their names as timm's, and how each model's images were prepared."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qswin.models.checkpoints.layouts import window_of, without_buffers
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights

LIBRARY = "torchvision"
# (embedding, blocks of stage 3): (crop, resize), of swin_t, swin_s and swin_b (`Swin_T_Weights.IMAGENET1K_V1`, ...).
SWIN_SIZES = {(96, 6): (224, 232), (96, 18): (224, 246), (128, 18): (224, 238)}
SWIN_V2_SIZES = {(96, 6): (256, 260), (96, 18): (256, 260), (128, 18): (256, 272)}
# (embedding, patch): of vit_b_16, vit_b_32, vit_l_16 and vit_l_32, bilinear.
VIT_SIZES = {(768, 16): (224, 256), (768, 32): (224, 256), (1024, 16): (224, 242), (1024, 32): (224, 256)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center"}

SWIN_RENAMES = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)
VIT_RENAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)


def read_swin(state: dict[str, Tensor], folder: Path) -> Weights:
    """A Swin or Swin V2. `features` holds the patch embedding, then stages and mergings in turn."""
    renamed = {_swin_name(key): value for key, value in state.items()}
    v2 = any(key.endswith(".logit_scale") for key in renamed)
    if v2:
        renamed = _split_bias(renamed)
    sides = window_of(renamed, "relative_coords_table" if v2 else "relative_position_bias_table")
    settings = {
        "window_size": sides[0],
        "padding": "torchvision",
        **({"pretrained_window_sizes": [0] * len(sides)} if v2 else {}),
    }
    embedding = renamed["patch_embed.proj.weight"].shape[0]
    depth = len({key.split(".")[3] for key in renamed if key.startswith("layers.2.blocks.")})
    sizes = (SWIN_V2_SIZES if v2 else SWIN_SIZES).get((embedding, depth))
    return _weights(without_buffers(renamed), settings, sizes, "bicubic")


def _swin_name(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "features" and int(parts[1]) > 0:
        index, rest = int(parts[1]), ".".join(parts[2:])
        key = f"layers.{index // 2}.downsample.{rest}" if index % 2 == 0 else f"layers.{index // 2}.blocks.{rest}"
    return rename(key, SWIN_RENAMES)


def _split_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """V2's `qkv.bias` as q_bias and v_bias; torchvision computes with 0 for the key's, whatever is stored."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".attn.qkv.bias"):
            attn = key.removesuffix("qkv.bias")
            split[f"{attn}q_bias"], _, split[f"{attn}v_bias"] = value.chunk(3)
        else:
            split[key] = value
    return split


def read_vit(state: dict[str, Tensor], folder: Path) -> Weights:
    """A ViT."""
    renamed = {rename(key, VIT_RENAMES): value for key, value in state.items()}
    embedding, _, patch, _ = renamed["patch_embed.proj.weight"].shape
    sizes = VIT_SIZES.get((embedding, patch))
    heads: dict[str, object] = {"num_heads": 16} if embedding == 1280 else {}  # vit_h_14's, which no tensor tells
    return _weights(renamed, heads, sizes, "bilinear")


def _weights(
    state: dict[str, Tensor], settings: dict[str, object], sizes: tuple[int, int] | None, interpolation: str
) -> Weights:
    """Weights whose preprocessing is that of the published model of their size; the model's own for another size."""
    if sizes is None:
        return Weights(state, LIBRARY, settings)
    crop, resize = sizes
    preprocessing = {**IMAGENET, "interpolation": interpolation, "crop_pct": crop / resize}
    return Weights(state, LIBRARY, settings, preprocessing, f"torchvision: resize {resize}, crop {crop}")


SWIN = Source(r"features\.1\.0\.attn\.qkv\.weight$", read_swin)
VIT = Source(r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight$", read_vit)
