"""Checkpoints of other libraries: random weights of the real library, and its own logits, which ours must equal."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from qswin.models.checkpoints.state_dicts import read_state
from qswin.models.registry import build_model, read_checkpoint
from tests.helpers import CVT, V1, V2, VIT
from tests.models.checkpoints.openmmlab import OpenMMLabSwin

SMALL = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "img_size": 32}
HF_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
HF_VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128}


def lively(model: nn.Module) -> nn.Module:
    """Random weights, all of them, of a size at which every part of the model shows in its logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator)
        if "logit_scale" in name:
            parameter.data += 0.3 * noise
        else:
            parameter.data = 1 + 0.3 * noise if norm else 0.3 * noise
    return model.eval()


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    """Of quite different contrast: an epsilon shows where values are small."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator) * torch.logspace(-3, 0, count)[:, None, None, None]


@torch.no_grad()
def assert_same_logits(model: nn.Module, expected: torch.Tensor, batch: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest, and not because they are all alike."""
    assert expected.std(dim=0).max() > 0.01 * expected.abs().max()
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def torchvision_swin(v2: bool, side: int = 4) -> nn.Module:
    from torchvision.models import swin_transformer as theirs

    parts = {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2} if v2 else {}
    sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return lively(theirs.SwinTransformer(**sizes, window_size=[side, side], num_classes=5, **parts))


@pytest.mark.parametrize("name", [V1, V2])
def test_torchvision_swin(tmp_path, name):
    theirs = torchvision_swin(name == V2)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = build_model(name, 5, tmp_path / "a.pth", **SMALL)
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "resize"),
    [
        ("swin_tiny_patch4_window7_224", "swin_t", 232),
        ("swin_small_patch4_window7_224", "swin_s", 246),
        ("swin_base_patch4_window7_224", "swin_b", 238),
        ("swinv2_tiny_window8_256", "swin_v2_t", 260),
        ("swinv2_small_window8_256", "swin_v2_s", 260),
        ("swinv2_base_window8_256", "swin_v2_b", 272),
        ("vit_base_patch16_224", "vit_b_16", 256),
    ],
)
def test_torchvision_models_of_full_size(tmp_path, name, theirs, resize):
    model = torchvision.models.get_model(theirs).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    weights = read_checkpoint(name, tmp_path / "a.pth")
    assert weights.preprocessing_from.startswith(f"torchvision: resize {resize}, crop")
    ours = build_model(name, checkpoint=weights)
    batch = images(2, 256 if "v2" in theirs else 224)
    with torch.no_grad():
        assert_same_logits(ours, model(batch), batch)


def test_torchvision_vit(tmp_path):
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5)
    torch.save(lively(theirs).state_dict(), tmp_path / "a.pth")
    ours = build_model("vit_tiny_patch16_224", 5, tmp_path / "a.pth", **VIT)
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


def save_pretrained(kind: str, folder: Path, **settings) -> nn.Module:
    """A model of transformers with random weights, saved to a folder."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}ForImageClassification{settings.pop('more', '')}")
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **settings)
    model = lively(theirs(config))
    model.save_pretrained(folder)
    return model


HF_CASES = {
    "swin": ("Swin", HF_SWIN, V1, SMALL),
    "swin, no qkv bias": ("Swin", {**HF_SWIN, "qkv_bias": False}, V1, SMALL),
    "swin v2": ("Swinv2", HF_SWIN, V2, SMALL),
    "swin v2 of a larger window": ("Swinv2", {**HF_SWIN, "window_size": 8}, V2, SMALL),
    "swin v2, pretrained windows": ("Swinv2", {**HF_SWIN, "pretrained_window_sizes": [3, 3, 3, 2]}, V2, SMALL),
    "swin v2, no qkv bias": ("Swinv2", {**HF_SWIN, "qkv_bias": False}, V2, SMALL),
    "vit": ("ViT", {**HF_VIT, "num_attention_heads": 2}, "vit_tiny_patch16_224", VIT),
    "vit of other heads": ("ViT", {**HF_VIT, "num_attention_heads": 4}, "vit_tiny_patch16_224", VIT),
    "vit of another epsilon": (
        "ViT",
        {**HF_VIT, "num_attention_heads": 2, "layer_norm_eps": 1e-3},
        "vit_tiny_patch16_224",
        VIT,
    ),
    "vit, no qkv bias": ("ViT", {**HF_VIT, "num_attention_heads": 2, "qkv_bias": False}, "vit_tiny_patch16_224", VIT),
    "deit": ("DeiT", {**HF_VIT, "num_attention_heads": 2}, "deit_tiny_patch16_224", VIT),
    "deit with teacher": (
        "DeiT",
        {**HF_VIT, "num_attention_heads": 2, "more": "WithTeacher"},
        "deit_tiny_distilled_patch16_224",
        VIT,
    ),
}


@pytest.mark.parametrize("case", HF_CASES)
def test_hugging_face(tmp_path, case):
    """What config.json says goes before what the model's name implies, unless it is set."""
    kind, theirs, name, ours = HF_CASES[case]
    model = save_pretrained(kind, tmp_path, **theirs)
    told = ("img_size", "num_heads") if "vit" in name or "deit" in name else ("img_size",)
    settings = {key: value for key, value in ours.items() if key not in told}
    with torch.no_grad():
        assert_same_logits(build_model(name, 5, tmp_path, **settings), model(images()).logits, images())


@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin", "the model's own names", "old names"])
@pytest.mark.parametrize("case", ["swin", "vit"])
def test_hugging_face_files_and_names(tmp_path, case, layout):
    """Before transformers 5, models in memory had the names that files have; some wrote buffers too."""
    kind, theirs, name, ours = HF_CASES[case]
    model = save_pretrained(kind, tmp_path, **theirs)
    file = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    if layout != "model.safetensors":
        file.unlink()
        file = tmp_path / "pytorch_model.bin"
        state = model.state_dict() if layout == "the model's own names" else state
        if case == "swin" and layout == "old names":
            key = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
            state = {**state, key: torch.zeros(16, 16, dtype=torch.long)}
        torch.save(state, file)
    with torch.no_grad():
        assert_same_logits(build_model(name, 5, file, **ours), model(images()).logits, images())


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_in_several_files(tmp_path, kind):
    _, theirs, name, _ = HF_CASES["swin"]
    model = save_pretrained("Swin", tmp_path, **theirs)
    split(tmp_path, kind)
    assert len(list(tmp_path.glob("*-of-*"))) == 3
    weights = read_checkpoint(name, tmp_path)
    other = next(tmp_path.glob("*-of-*"))
    ours = build_model(name, 5, weights, **{key: value for key, value in SMALL.items() if key != "img_size"})
    with torch.no_grad():
        assert_same_logits(ours, model(images()).logits, images())
    changed = {key: value + 1 for key, value in read_state(other).items()}
    (safetensors.torch.save_file if other.suffix == ".safetensors" else torch.save)(changed, other)
    assert read_checkpoint(name, tmp_path).sha256 != weights.sha256  # it is of every file


def split(folder: Path, kind: str) -> None:
    """The weights of a folder as three files and their index, as save_pretrained writes large ones."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = kind.split(".")
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    names = {key: f"{stem}-0000{1 + place % 3}-of-00003.{suffix}" for place, key in enumerate(state)}
    for name in set(names.values()):
        save({key: value for key, value in state.items() if names[key] == name}, folder / name)
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


@pytest.mark.parametrize("layout", ["mmpretrain", "mmdet", "backbone alone"])
def test_openmmlab_swin(tmp_path, layout):
    theirs = lively(OpenMMLabSwin(16, [2, 2], [2, 4], 4, 5, norms=2 if layout == "mmdet" else 1))
    state = theirs.state_dict()
    if layout == "backbone alone":
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    elif layout == "mmdet":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state["neck.lateral_convs.0.conv.weight"] = torch.zeros(4, 16, 1, 1)
    torch.save({"meta": {"epoch": 1}, "state_dict": state}, tmp_path / "a.pth")
    ours = build_model(V1, 5, tmp_path / "a.pth", new_head=layout != "mmpretrain", **SMALL)
    if layout != "mmpretrain":
        ours.head.fc.load_state_dict(theirs.head.fc.state_dict())
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


def old_timm(model: nn.Module) -> dict[str, torch.Tensor]:
    """The names of timm before 0.9 and of the original repository: merging where a stage ends, `head.weight`."""
    names = {}
    for key in model.state_dict():
        stage = int(key.split(".")[1]) if ".downsample." in key else 0
        old = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1) if ".downsample." in key else key
        names[key] = old.replace("head.fc.", "head.")
    return {names[key]: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("headless", [False, True])
def test_timm_before_0_9(tmp_path, name, headless):
    theirs = lively(timm.create_model(name, num_classes=5, window_size=4, **SMALL))
    state = old_timm(theirs)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    if headless:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    torch.save({"model": state}, tmp_path / "a.pth")
    ours = build_model(name, 5, tmp_path / "a.pth", new_head=headless, window_size=4, **SMALL)
    if headless:
        ours.head.load_state_dict(theirs.head.state_dict())
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


def test_a_swin_of_timm_without_a_head(tmp_path):
    theirs = lively(timm.create_model(V1, num_classes=5, window_size=4, **SMALL))
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "a.pth")
    ours = build_model(V1, 5, tmp_path / "a.pth", new_head=True, window_size=4, **SMALL)
    ours.head.load_state_dict(theirs.head.state_dict())
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


def test_a_detectors_backbone_in_the_original_names(tmp_path):
    """Swin-Transformer-Object-Detection's: `backbone.`, and a norm for each feature map."""
    theirs = lively(timm.create_model(V1, num_classes=5, window_size=4, **SMALL))
    state = {f"backbone.{key}": value for key, value in old_timm(theirs).items() if not key.startswith("head.")}
    for end in ("weight", "bias"):
        state[f"backbone.norm1.{end}"] = state.pop(f"backbone.norm.{end}")
        state[f"backbone.norm0.{end}"] = torch.zeros(16)
    torch.save({"state_dict": {**state, "rpn_head.rpn_conv.bias": torch.zeros(3)}}, tmp_path / "a.pth")
    ours = build_model(V1, 5, tmp_path / "a.pth", new_head=True, window_size=4, **SMALL)
    ours.head.load_state_dict(theirs.head.state_dict())
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


def test_deit_with_two_heads(tmp_path):
    theirs = lively(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **VIT))
    torch.save({"model": theirs.state_dict()}, tmp_path / "a.pth")
    ours = build_model("deit_tiny_distilled_patch16_224", 5, tmp_path / "a.pth", **VIT)
    with torch.no_grad():
        tokens = theirs.forward_features(images())
        average = (theirs.head(tokens[:, 0]) + theirs.head_dist(tokens[:, 1])) / 2
        assert_same_logits(ours, average, images())


def old_deit_3(model: nn.Module) -> dict[str, torch.Tensor]:
    """The original repository's names of a DeiT III."""
    names = (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2")
    return {key.replace(*names[0]).replace(*names[1]): value for key, value in model.state_dict().items()}


def test_deit_3_of_the_original_repository(tmp_path):
    theirs = lively(timm.create_model("deit3_small_patch16_224", num_classes=5, **VIT))
    torch.save({"model": old_deit_3(theirs)}, tmp_path / "a.pth")
    ours = build_model("deit3_small_patch16_224", 5, tmp_path / "a.pth", **VIT)
    with torch.no_grad():
        assert_same_logits(ours, theirs(images()), images())


@pytest.mark.parametrize("name", [V1, V2, "vit_tiny_patch16_224"])
def test_timm(tmp_path, name):
    settings = VIT if name.startswith("vit") else {"window_size": 4, **SMALL}
    theirs = lively(timm.create_model(name, num_classes=5, **settings))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        assert_same_logits(build_model(name, 5, tmp_path / "a.pth", **settings), theirs(images()), images())


def test_hugging_face_cvt(tmp_path):
    theirs = save_pretrained("Cvt", tmp_path, **CVT)
    with torch.no_grad():
        assert_same_logits(build_model("cvt-13", 5, tmp_path, **CVT), theirs(images()).logits, images())


@pytest.mark.parametrize(("name", "settings"), [(V1, {**SMALL, "window_size": 4}), ("vit_tiny_patch16_224", VIT)])
def test_weights_for_grey_images_compute_the_same_of_three_equal_channels(tmp_path, name, settings):
    theirs = lively(timm.create_model(name, in_chans=1, num_classes=5, **settings))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours, grey = build_model(name, 5, tmp_path / "a.pth", **settings), images()[:, :1]
    with torch.no_grad():
        assert_same_logits(ours, theirs(grey), grey.expand(-1, 3, -1, -1))
