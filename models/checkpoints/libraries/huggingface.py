"""transformers' Swin, Swin V2, ViT and DeiT, as save_pretrained writes them: tensors, config.json, and a processor."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from torch import Tensor

from qswin.models.checkpoints.json_files import read_json
from qswin.models.checkpoints.layouts import feature_norms, join_qkv, next_stage, without_buffers
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights

LIBRARY = "Hugging Face"
TABLE = "relative_position_bias_table"
SWIN_EPS = 1e-5  # of the norms that config.layer_norm_eps is not for
FLOAT32_MAX = 3.4e38

Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Side = Count | Annotated[list[Count], Meta(min_length=1, max_length=2)]
Channel = Annotated[float, Meta(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
Channels = tuple[Channel, Channel, Channel]


class Config(msgspec.Struct):
    """What is read of config.json; the keys are transformers'."""

    model_type: str
    image_size: Side = 224
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)] | None = None
    qkv_bias: bool = True
    id2label: dict[str, str] = {}
    window_size: Side | None = None  # of Swin
    pretrained_window_sizes: list[Annotated[int, Meta(ge=0)]] | None = None
    use_absolute_embeddings: bool = False
    num_attention_heads: Count | None = None  # of ViT


class Processor(msgspec.Struct):
    """What is read of preprocessor_config.json; the keys are transformers'."""

    size: Count | dict[str, Count] = {}
    crop_size: Count | dict[str, Count] = {}
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    resample: int = 2
    image_mean: Channels = (0.5, 0.5, 0.5)
    image_std: Channels = (0.5, 0.5, 0.5)


# The names in files, and those that models have in memory since transformers 5, as timm's.
COMMON = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.((self|attention)\.)?(q)uery\.|\.attention\.(q)_proj\.", r".attn.q."),
    (r"\.attention\.((self|attention)\.)?(k)ey\.|\.attention\.(k)_proj\.", r".attn.k."),
    (r"\.attention\.((self|attention)\.)?(v)alue\.|\.attention\.(v)_proj\.", r".attn.v."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
SWIN_RENAMES = (
    (r"^swin(v2)?\.", ""),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (
        r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$",
        ".attn.relative_position_bias_table",
    ),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.logit_scale$", ".attn.logit_scale"),
    *COMMON,
    (r"^classifier\.", "head.fc."),
)
VIT_RENAMES = (
    (r"^(vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    *COMMON,
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
UNUSED = r"^embeddings\.mask_token$|^pooler\.|^decoder\."  # of pretraining, and of models without a classifier
FEATURE_NORM = r"^hidden_states_norms\.stage(\d)\."  # of a SwinBackbone, whose first stage is 1
BASE = "it is a model without a classifier"


def read_swin(state: dict[str, Tensor], folder: Path) -> Weights:
    """A Swin or Swin V2.

    Raises:
        ValueError: config.json is missing, or describes what timm's models cannot compute.
    """
    config = _read_config(folder, ("swin", "swinv2"))
    if config.use_absolute_embeddings:
        raise ValueError("use_absolute_embeddings in config.json is not supported; train a Swin without them")
    if config.layer_norm_eps not in (None, SWIN_EPS):
        raise ValueError(f"layer_norm_eps={config.layer_norm_eps} in config.json is not supported; timm has {SWIN_EPS}")
    renamed = {next_stage(key): value for key, value in _renamed(state, SWIN_RENAMES).items()}
    renamed = {re.sub(FEATURE_NORM, _feature_norm, key): value for key, value in renamed.items()}
    settings: dict[str, Any] = {"img_size": config.image_size, "window_size": config.window_size}
    settings |= feature_norms(renamed)
    settings["padding"] = "huggingface-backbone" if "feature_norms" in settings else "huggingface"
    if config.model_type == "swinv2":
        stages = len({key.split(".")[1] for key in renamed if key.startswith("layers.")})
        settings["padding"] = "huggingface-v2"
        settings["pretrained_window_sizes"] = (config.pretrained_window_sizes or [0] * stages)[:stages]
    return _weights(renamed, "head.fc.weight", settings, config, folder)


def read_vit(state: dict[str, Tensor], folder: Path) -> Weights:
    """A ViT or DeiT. A DeiT has a distillation token; timm has it as a register where no second head reads it.

    Raises:
        ValueError: config.json is missing, or describes what timm's models cannot compute.
    """
    config = _read_config(folder, ("vit", "deit"))
    renamed = _renamed(state, VIT_RENAMES)
    settings: dict[str, Any] = {"img_size": config.image_size, "num_heads": config.num_attention_heads}
    settings["norm_eps"] = config.layer_norm_eps or 1e-12  # ViTConfig's and DeiTConfig's default
    token = renamed.pop("embeddings.distillation_token", None)
    if token is not None and "head_dist.weight" in renamed:
        renamed["dist_token"] = token
    elif token is not None:
        renamed["reg_token"] = token
        settings["reg_tokens"] = 1
    return _weights(renamed, "head.weight", settings, config, folder)


def _feature_norm(match: re.Match[str]) -> str:
    return f"norm{int(match[1]) - 1}."


def _renamed(state: Mapping[str, Tensor], renames: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {rename(key, renames): value for key, value in without_buffers(state).items()}
    return join_qkv({key: value for key, value in renamed.items() if not re.match(UNUSED, key)})


def _weights(state: dict[str, Tensor], head: str, settings: dict[str, Any], config: Config, folder: Path) -> Weights:
    given = {key: value for key, value in settings.items() if value is not None}
    if not config.qkv_bias:
        given["qkv_bias"] = False
    preprocessing, told = _read_processor(folder)
    headless = None if head in state else BASE
    return Weights(state, LIBRARY, given, preprocessing, told, _classes(config), headless=headless)


def _read_config(folder: Path, types: tuple[str, ...]) -> Config:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            "transformers' weights need the config.json that save_pretrained wrote beside them; copy it there"
        )
    config = read_json(file, Config)
    if config.model_type not in types:
        raise ValueError(f"model_type={config.model_type!r} in config.json is not one of {', '.join(types)}")
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act={config.hidden_act!r} in config.json is not supported; models here have gelu")
    return config


def _classes(config: Config) -> tuple[str, ...] | None:
    """The labels in order; None where they are transformers' placeholders, or are not numbered from 0."""
    numbered = [config.id2label.get(str(index)) for index in range(len(config.id2label))]
    names = tuple(name for name in numbered if name is not None)
    placeholders = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return None if placeholders or len(names) < len(numbered) else names


def _read_processor(folder: Path) -> tuple[dict[str, Any], str | None]:
    """How the processor beside the weights prepares images, and its name; nothing where there is none.

    Raises:
        ValueError: it does what qswin's preprocessing cannot do.
    """
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}, None
    processor = read_json(file, Processor)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, step):
            raise ValueError(f"{step}=false in {file.name} is not supported; mend the file, or remove it")
    interpolation: Literal["bilinear", "bicubic"] | None = {2: "bilinear", 3: "bicubic"}.get(processor.resample)  # type: ignore[assignment]
    if interpolation is None or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        what = f"resample={processor.resample}, rescale_factor={processor.rescale_factor}"
        raise ValueError(f"{what} in {file.name} is not supported; 2 or 3, and 1 / 255, are")
    resized, mode = _side(processor.size)
    cropped = _side(processor.crop_size)[0] if processor.do_center_crop else resized
    settings = {"mean": processor.image_mean, "std": processor.image_std, "interpolation": interpolation}
    return {**settings, "crop_pct": min(cropped / resized, 1.0), "crop_mode": mode}, file.name


def _side(size: int | dict[str, int]) -> tuple[int, str]:
    """The side that an image is resized to, and whether its own proportions are kept ("center") or not ("squash")."""
    if isinstance(size, int):
        return size, "squash"
    if "shortest_edge" in size:
        return size["shortest_edge"], "center"
    height = size.get("height", 224)
    if size.get("width", height) != height:
        raise ValueError(f"size {size} in preprocessor_config.json is not square; only square inputs are supported")
    return height, "squash"


SWIN = Source(r"(swin(v2)?\.)?encoder\.layers\.0\.blocks\.0\.attention\.", read_swin)
VIT = Source(r"((vit|deit)\.)?(encoder\.layer|layers)\.0\.attention\.", read_vit)
