"""CvT, as in transformers: convolutional token embeddings and projections, a class token in the last stage."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.state_dicts import rename
from qswin.models.checkpoints.weights import Source, Weights
from qswin.models.family import Family

DEPTHS = {"cvt-13": [1, 2, 10], "cvt-21": [1, 4, 16]}


class Cvt(nn.Module):
    """transformers' CvtForImageClassification under its own state-dict names, from images to logits.

    (B, 3, H, W) -> (B, num_classes); H and W are multiples of 16.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.num_classes = model.num_labels
        self.cvt: Any = model.cvt
        self.layernorm, self.classifier = model.layernorm, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        cls_token = None
        for stage in self.cvt.encoder.stages:
            x, cls_token = stage(x)
        tokens = x.flatten(2).transpose(1, 2) if cls_token is None else cls_token
        return self.classifier(self.layernorm(tokens).mean(dim=1))


def names() -> list[str]:
    """The published models, without their publisher."""
    return list(DEPTHS)


def build(
    name: str, num_classes: int | None = None, pretrained: bool = False, activation: str = "gelu", **kwargs: Any
) -> Cvt:
    """A CvT.

    Args:
        activation: "gelu" is transformers'; "quick_gelu" is what the original repository trained its weights with.
        kwargs: CvtConfig's settings.

    Raises:
        ValueError: transformers is not installed, or the activation is not one of the two.
    """
    try:
        from transformers import CvtConfig, CvtForImageClassification
        from transformers.activations import ACT2FN
    except ImportError as error:
        raise ValueError(f"{name} needs the transformers library: pip install 'qswin[cvt]'") from error
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"model {name!r}: activation {activation!r} is not known; choose gelu or quick_gelu")
    kwargs = {"num_labels": num_classes or 1000, **kwargs}
    model: Any
    if pretrained:
        model = CvtForImageClassification.from_pretrained(f"microsoft/{name}", ignore_mismatched_sizes=True, **kwargs)
    else:
        model = CvtForImageClassification(CvtConfig(**{"depth": DEPTHS[name], **kwargs}))
    if activation != "gelu":
        for stage in model.cvt.encoder.stages:
            for layer in stage.layers:
                layer.intermediate.activation = ACT2FN[activation]
    return Cvt(model)


# The original repository's names, in order, and what they become.
RENAMES = (
    (r"^stage(\d+)\.", r"cvt.encoder.stages.\1."),
    (r"\.patch_embed\.proj\.", ".embedding.convolution_embeddings.projection."),
    (r"\.patch_embed\.norm\.", ".embedding.convolution_embeddings.normalization."),
    (r"\.blocks\.", ".layers."),
    (r"\.attn\.conv_proj_(.)\.", r".attention.attention.convolution_projection_\1.convolution_projection."),
    (r"_projection\.conv\.", "_projection.convolution."),
    (r"_projection\.bn\.", "_projection.normalization."),
    (r"\.attn\.proj_(.)\.", r".attention.attention.projection_\1."),
    (r"projection_q\.", "projection_query."),
    (r"projection_k\.", "projection_key."),
    (r"projection_v\.", "projection_value."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
)


def convert_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state under transformers' names.

    Raises:
        ValueError: it is the original repository's, and the model's activation is not the one it was trained with.
    """
    if not any(key.startswith("stage") for key in state):
        return state
    if any(type(module) is nn.GELU for module in model.modules()):
        raise ValueError(
            "the original repository's weights were trained with model.kwargs.activation=quick_gelu; set it"
        )
    return {rename(key, RENAMES): value for key, value in state.items()}


def read(state: dict[str, Tensor], folder: Path) -> Weights:
    """Transformers' weights, or the original repository's, as they are."""
    original = any(key.startswith("stage") for key in state)
    return Weights(state, "the original repository" if original else "Hugging Face")


def recognize(weights: Weights) -> Recognized:
    """The published model of the checkpoint's depth; raises ValueError for another depth."""
    original = any(key.startswith("stage") for key in weights.state)
    keys = [rename(key, RENAMES) for key in weights.state] if original else list(weights.state)
    blocks = {tuple(key.split(".")[3:6:2]) for key in keys if ".layers." in key}
    depth = [sum(stage == str(index) for stage, _ in blocks) for index in range(3)]
    name = next((name for name, known in DEPTHS.items() if known == depth), None)
    if name is None:
        published = " or ".join(map(str, DEPTHS.values()))
        raise ValueError(f"a CvT of {depth} layers; only those of {published} are known, cvt-13 and cvt-21")
    head = weights.state.get("head.weight" if original else "classifier.weight")
    settings = {"activation": "quick_gelu"} if original else {}
    return Recognized(name, None if head is None else len(head), settings)


def preprocessing(model: Any) -> dict[str, Any]:
    """The published processor's, with ImageNet's statistics. CvT takes any size; a config may set another."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return {"size": (224, 224), "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 0.875}


# transformers' module paths as the names that recipes use for every family.
SITES = (
    (r"(^|\.)cvt\.encoder\.", r"\1"),
    (r"\.embedding\.convolution_embeddings\.projection$", ".patch_embed"),
    (r"\.attention\.attention\.convolution_projection_(\w+)\.convolution_projection\.convolution$", r".attn.conv.\1"),
    (r"\.attention\.attention\.projection_(\w+)$", r".attn.qkv.\1"),
    (r"\.attention\.attention$", ".attn"),
    (r"\.attention\.output\.dense$", ".attn.proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"\.output\.dense$", ".mlp.fc2"),
    (r"(^|\.)classifier$", r"\1head"),
)
SETTINGS = (  # of CvtConfig, and `activation`
    *("activation", "patch_sizes", "patch_stride", "patch_padding", "embed_dim", "num_heads", "depth", "mlp_ratio"),
    *("attention_drop_rate", "drop_rate", "drop_path_rate", "qkv_bias", "cls_token", "qkv_projection_method"),
    *("kernel_qkv", "padding_kv", "stride_kv", "padding_q", "stride_q", "initializer_range", "layer_norm_eps"),
)
FAMILY = Family(
    name="cvt",
    task="classification",
    names=names,
    build=build,
    preprocessing=preprocessing,
    convert_state=convert_state,
    sources=(Source(r"cvt\.encoder\.stages\.0\.|stage0\.patch_embed\.", read),),
    recognize=recognize,
    head=("classifier.",),
    sites=SITES,
    fixed={"num_channels": (3, "images have three channels")},
    settings=SETTINGS,
)
