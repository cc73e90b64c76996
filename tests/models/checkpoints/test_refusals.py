"""What is not a checkpoint of these models: refused in one line, by name where it has one, with what to do."""

import json

import pytest
import timm
import torch
import torchvision

from qswin.models.registry import build_model, family_of, read_checkpoint
from tests.helpers import V1, V2, VIT, small_swin
from tests.models.checkpoints.openmmlab import OpenMMLabSwin
from tests.models.checkpoints.test_logits import HF_CASES, SMALL, save_pretrained, split, torchvision_swin


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maxvit_tiny_tf_224", "MaxViT is not supported: .*the nearest that works is swin_tiny_patch4_window7_224"),
        ("swinv2_cr_tiny_224", "swinv2_cr is not supported: .*nearest that works is swinv2_tiny_window8_256"),
        ("swin3d_t", "Swin3D is not supported: .*for single images take swin_tiny"),
        ("swinir_classical", "SwinIR is not supported: .*nearest that works is swin_unet"),
        ("vit_base_patch16_dinov3", "DINOv3 is not supported: .*rotary.*nearest that works is vit_base_patch16_224"),
        ("vit_base_patch16_rope_224", "DINOv3 is not supported: .*rotary"),
        ("beit_base_patch16_224", "BEiT is not supported"),
        ("vit_small_patch16_18x2_224", ".* is not supported: its blocks have no quantized twins"),
    ],
)
def test_names_of_other_models(name, words):
    with pytest.raises(ValueError, match=f"model '{name}': {words}") as error:
        family_of(name)
    assert "\n" not in str(error.value)


def tiny(name, **settings):
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    return {key: torch.zeros(1).expand(1).clone() for key in model.state_dict()}


OTHERS = {
    "MaxViT": lambda: tiny("maxvit_tiny_tf_224"),
    "MaxViT of torchvision": lambda: dict.fromkeys(["blocks.0.layers.0.layers.MBconv.proj.1.weight"], torch.zeros(1)),
    "swinv2_cr": lambda: tiny("swinv2_cr_tiny_224"),
    "Swin3D": lambda: {"patch_embed.proj.weight": torch.zeros(96, 3, 2, 4, 4)},
    "SwinIR": lambda: {"layers.0.residual_group.blocks.0.attn.qkv.weight": torch.zeros(1)},
    "DINOv3": lambda: tiny("vit_small_patch16_dinov3", pretrained=False) | {"rope_embed.periods": torch.zeros(1)},
    "BEiT": lambda: tiny("beit_base_patch16_224"),
    "Swin-MLP": lambda: {"layers.0.blocks.0.spatial_mlp.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", [V1, "vit_tiny_patch16_224"])
def test_checkpoints_of_other_models(tmp_path, kind, name):
    torch.save(OTHERS[kind](), tmp_path / "a.pth")
    words = f"a.pth: a checkpoint of {kind.split(' ')[0]}, which is not supported: .*(nearest|take|train)"
    with pytest.raises(ValueError, match=words):
        read_checkpoint(name, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: torchvision.models.resnet18().state_dict(), "a foreign checkpoint .*'conv1.weight'.*docs/models.md"),
        (lambda: timm.create_model("vit_tiny_patch16_224", **VIT).state_dict(), "of the family 'vit'; choose a model"),
        (lambda: {f"swin_net.{k}": v for k, v in small_swin().state_dict().items()}, "a foreign checkpoint"),
        (lambda: {k: v for k, v in torchvision_swin(False).state_dict().items() if "mlp.3" not in k}, "fc2.*missing"),
        (
            lambda: {k: v for k, v in torchvision_swin(False).state_dict().items() if "features.0" not in k},
            "not a whole checkpoint",
        ),
        (lambda: OpenMMLabSwin(16, [2, 2], [2, 4], 4, 7).state_dict(), "head.fc.weight has shape .*new_head=true"),
        (lambda: OpenMMLabSwin(16, [2, 2, 2], [2, 4, 8], 4, 5).state_dict(), "not a checkpoint of this model"),
        (
            lambda: {"stages.0.blocks.0.attn.w_msa.logit_scale": torch.zeros(1)},
            "Swin V2 of OpenMMLab, which is not read; take",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, state, words):
    torch.save(state(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{words}") as error:
        build_model(V1, 5, tmp_path / "a.pth", **SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels(tmp_path, channels):
    theirs = timm.create_model(V1, in_chans=channels, num_classes=5, window_size=4, **SMALL)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"takes {channels} channels, and images have one or three here"):
        build_model(V1, 5, tmp_path / "a.pth", window_size=4, **SMALL)


def test_pre_logits_heads_are_refused_unless_the_head_is_new(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
    state = theirs.state_dict() | {"pre_logits.fc.weight": torch.zeros(32, 32), "pre_logits.fc.bias": torch.zeros(32)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="its head reads a pre-logits layer.*model.new_head=true"):
        build_model("vit_tiny_patch16_224", 5, tmp_path / "a.pth", **VIT)
    ours = build_model("vit_tiny_patch16_224", 3, tmp_path / "a.pth", new_head=True, **VIT)
    assert torch.equal(ours.blocks[1].mlp.fc2.weight, theirs.blocks[1].mlp.fc2.weight) and len(ours.head.bias) == 3


@pytest.mark.parametrize("name", [V1, V2])
def test_an_imagenet_22k_head_goes(tmp_path, name):
    theirs = small_swin(name)
    state = theirs.state_dict() | {"head.fc.weight": torch.zeros(21841, 32), "head.fc.bias": torch.zeros(21841)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"head.fc.weight has shape \(21841, 32\).*set model.new_head=true"):
        build_model(name, 5, tmp_path / "a.pth", window_size=4, **SMALL)
    ours = build_model(name, 5, tmp_path / "a.pth", new_head=True, window_size=4, **SMALL)
    assert ours.head.fc.weight.shape == (5, 32) and bool(ours.head.fc.weight.any())
    assert torch.equal(ours.norm.weight, theirs.norm.weight)


def test_a_new_head_needs_a_checkpoint():
    with pytest.raises(ValueError, match="new_head=true needs the checkpoint"):
        build_model(V1, 5, new_head=True, **SMALL)


def test_absolute_position_embeddings_are_refused(tmp_path):
    state = {"layers.0.downsample.norm.weight": torch.zeros(64), "absolute_pos_embed": torch.zeros(1, 256, 16)}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="absolute position embeddings"):
        build_model(V1, 5, tmp_path / "a.pth", **SMALL)


@pytest.fixture
def folder(tmp_path):
    """A Swin that save_pretrained wrote."""
    save_pretrained("Swin", tmp_path, **HF_CASES["swin"][1])
    return tmp_path


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def spoil_split(folder, spoil):
    """A folder of several files, after something was done to the index's map and to the files."""
    split(folder, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    spoil(values["weight_map"], sorted(folder.glob("*-of-*")))
    index.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "a folder without weights; it must hold model.safetensors or"),
        (lambda f: (f / "config.json").unlink(), "need the config.json that save_pretrained wrote"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: .*copy it again"),
        (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json cannot be read"),
        (lambda f: change(f / "config.json", image_size="large"), "config.json cannot be read: .*image_size"),
        (lambda f: change(f / "config.json", image_size=10**9), "not between"),
        (lambda f: change(f / "config.json", model_type="dinov2"), "model_type='dinov2' in config.json is not one of"),
        (lambda f: change(f / "config.json", hidden_act="relu"), "hidden_act='relu' in config.json is not supported"),
        (lambda f: change(f / "config.json", layer_norm_eps=1e-3), "layer_norm_eps=0.001 in config.json is not"),
        (lambda f: change(f / "config.json", use_absolute_embeddings=True), "use_absolute_embeddings"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "truncated, or not a safetensors file"),
        (
            lambda f: (f / "model.safetensors").rename(f / "x") and (f / "m.index.json").write_text("{}"),
            "a folder without weights",
        ),
        (
            lambda f: spoil_split(f, lambda map_, files: files[1].unlink()),
            "-of-00003.safetensors: missing, but .* names",
        ),
        (lambda f: spoil_split(f, lambda map_, files: map_.update(x=files[0].name)), "x is in none of its files"),
        (lambda f: spoil_split(f, lambda map_, files: map_.update(x="../x.safetensors")), "'../x.safetensors' is not"),
        (lambda f: spoil_split(f, lambda map_, files: map_.update(x=3)), "index.json cannot be read: .*weight_map"),
        (lambda f: spoil_split(f, lambda map_, files: files[0].write_bytes(b"x")), "truncated, or not a safetensors"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"resample": 0}'), "resample=0.*not supported"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"do_resize": false}'), "do_resize=false"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'), "image_mean"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"size": {"height": 2, "width": 3}}'), "not square"),
    ],
)
def test_folders_that_cannot_be_used_say_why(folder, spoil, words):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        build_model(V1, 5, folder, **{key: value for key, value in SMALL.items() if key != "img_size"})
    assert "\n" not in str(error.value) and str(folder) in str(error.value) or "img_size" in str(error.value)


def test_a_folder_that_is_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder without weights"):
        build_model(V1, 5, tmp_path, **SMALL)


def test_labels_come_in_order_unless_they_are_placeholders(folder):
    assert read_checkpoint(V1, folder).classes is None
    change(folder / "config.json", id2label={str(index): f"bird {9 - index}" for index in range(5)})
    assert read_checkpoint(V1, folder).classes == ("bird 9", "bird 8", "bird 7", "bird 6", "bird 5")
