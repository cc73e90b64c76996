"""Model names and checkpoint files, the original repository's among them."""

import importlib
import time

import pytest
import safetensors.torch
import timm
import torch

from qswin.models import limits, registry, swin, vit
from qswin.models.checkpoints.state_dicts import read_state
from qswin.models.discovery import offers
from qswin.models.family import Family
from qswin.models.registry import build_model, families, family_of, site_name
from tests.helpers import SMALL, V1, V2, small_swin


def original_layout(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A timm state under the names of the original Swin repository, with the buffers that it stores."""
    state = {}
    for key, value in model.state_dict().items():
        if ".downsample." in key:  # the original merges patches at the end of the stage before
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        state[key.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return state


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("layout", ["safetensors", "pth", "original", "wrapped"])
def test_checkpoints_of_every_layout_load(tmp_path, name, layout):
    model = small_swin(name, seed=3)
    state = model.state_dict()
    file = tmp_path / ("a.safetensors" if layout == "safetensors" else "a.pth")
    if layout == "safetensors":
        safetensors.torch.save_file(state, file)
    elif layout == "original":
        torch.save({"model": original_layout(model)}, file)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if layout == "wrapped" else state, file)
    loaded = build_model(name, num_classes=5, checkpoint=file, **SMALL)
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_half_precision_weights_become_float32(tmp_path):
    torch.save({k: v.half() for k, v in small_swin().state_dict().items()}, tmp_path / "a.pth")
    assert {value.dtype for value in read_state(tmp_path / "a.pth").values()} == {torch.float32}


def test_names_are_those_with_twins():
    assert {"swin_tiny_patch4_window7_224", "swinv2_base_window8_256"} <= set(swin.names())
    assert not [name for name in swin.names() if "_cr_" in name]


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224"):
        family_of("swin_tiny_patch4_window7")


def test_preprocessing_is_the_models_own():
    values = swin.preprocessing(small_swin())
    assert (
        values["size"] == (32, 32) and values["mean"] == (0.485, 0.456, 0.406) and values["interpolation"] == "bicubic"
    )


VIT_NAME, UNET_NAME = "vit_tiny_patch16_224", "swin_unet_tiny_patch4_window7_224"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (V1, {"embed_dimension": 3}, "embed_dimension"),
        (V1, {"in_chans": 1}, "in_chans=1 is not supported: images have three channels; leave it at 3"),
        (V2, {"features_only": True}, "features_only=True is not supported: out_features makes a backbone"),
        (VIT_NAME, {"in_chans": 4}, "in_chans=4 is not supported"),
        (UNET_NAME, {"in_chans": 1}, "in_chans"),
        (V1, {"num_heads": [0, 0, 0, 0]}, "settings do not work: .*zero"),
        (V1, {"embed_dim": -96}, "settings do not work: "),
        (V1, {"depths": 3}, "settings do not work: "),
        (V1, {"num_classes": 0}, "num_classes=0 is not supported; give 1 or more"),
        (UNET_NAME, {"num_classes": -1}, "num_classes=-1 is not supported"),
    ],
)
def test_settings_that_do_not_work_say_so(name, settings, words):
    """In one line, when the model is built; timm takes some of them, and calibration or exporting failed later."""
    with pytest.raises(ValueError, match=f"model '{name}': .*{words}") as error:
        build_model(name, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretrained_cfg", {"url": "http://localhost:9/weights.pth"}),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("checkpoint_path", "/etc/passwd"),
        ("cache_dir", "/tmp"),
        ("device", "meta"),
        ("dtype", "float16"),
        ("file", "/etc/passwd"),
        ("embed_layer", "x"),
        ("block_fn", "x"),
        ("name_or_path", "/etc"),
    ],
)
@pytest.mark.parametrize("name", [V1, V2, VIT_NAME, UNET_NAME, "cvt-13"])
def test_a_setting_chooses_nothing_but_the_architecture(name, key, value):
    with pytest.raises(ValueError, match=f"model '{name}': '{key}' is not a setting of the architecture; there are "):
        build_model(name, **{key: value})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (V1, {"img_size": 10**6}, r"img_size=1e\+06 is not between -8192 and 8192; .*QSWIN_LIMITS=2 doubles"),
        (V1, {"depths": [10**9]}, "depths=1e"),
        (V1, {"depths": [2000, 2, 2, 2]}, "at most 512 blocks are built"),
        (VIT_NAME, {"depth": 1000}, "depth=1000: at most 512 blocks are built"),
        (V1, {"depths": [1] * 100}, "depths has 100 entries; give at most 64"),
        (V1, {"num_classes": 10**9}, "num_classes=1000000000 is not supported; give 1 or more, to 1000000"),
        (V1, {"num_classes": "5"}, "num_classes='5' is not supported"),
        (V1, {"embed_dim": 8192}, r"would have more than 1.68e\+07 values; .*QSWIN_LIMITS=2"),
        (V1, {"window_size": 8000, "img_size": 8000, "patch_size": 1}, "would have more than"),
        (VIT_NAME, {"embed_dim": 8184, "depth": 512}, "would have more than"),
        (UNET_NAME, {"embed_dim": 4096}, "would have more than"),
        ("cvt-13", {"embed_dim": [64, 8192, 8192]}, "would have more than"),
        (V1, {"drop_path_rate": float("nan")}, "drop_path_rate=nan is not between"),
        (V1, {"mlp_ratio": {"a": 1}}, "mlp_ratio is a dict; give a number, text, or a list of them"),
    ],
)
def test_a_model_that_is_too_large_is_refused_before_it_is_built(name, settings, words, monkeypatch):
    begun = time.monotonic()
    monkeypatch.setattr(limits, "MOST_VALUES", 2**24)
    with pytest.raises(ValueError, match=f"model '{name}': .*{words}"):
        build_model(name, **settings)
    assert time.monotonic() - begun < 30


def test_counting_a_models_values_does_not_change_them():
    torch.manual_seed(0)
    expected = timm.create_model(V1, num_classes=5, **SMALL).state_dict()
    torch.manual_seed(0)
    for name, tensor in build_model(V1, 5, **SMALL).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_settings_that_say_what_is_so_are_taken():
    assert build_model(V1, 5, in_chans=3, features_only=False, **SMALL).num_classes == 5


def test_every_family_is_found():
    assert {family.name for family in families()} >= {"cvt", "swin", "swin-unet", "vit"}
    assert all(family.names() for family in families())


def test_a_family_has_a_task_that_is_known():
    with pytest.raises(
        ValueError, match="family 'x': task 'detection' is not known; choose classification or segmentation"
    ):
        Family("x", "detection", list, small_swin, swin.preprocessing)


def test_parameters_without_weight_decay_are_the_position_biases_and_scales():
    for name, expected in ((V1, {"relative_position_bias_table"}), (V2, {"logit_scale"})):
        ends = family_of(name).no_weight_decay
        named = [key for key, _ in small_swin(name).named_parameters() if key.endswith(ends)]
        assert {key.rpartition(".")[2] for key in named} == expected and len(named) == 4


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("patch_embed.proj", "patch_embed"),
        ("model.backbone.patch_embed.proj", "model.backbone.patch_embed"),
        ("head.fc", "head"),
        ("backbone.head.fc", "backbone.head"),
        ("mlp_head.fc", "mlp_head.fc"),
        ("output", "head"),
        ("mlp.output", "mlp.output"),
        ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.attn.qkv"),
        ("net.cvt.encoder.stages.1.layers.0.attention.output.dense", "net.stages.1.layers.0.attn.proj"),
    ],
)
def test_sites_are_named_alike_at_any_depth(path, site):
    assert site_name(path) == site


def test_a_module_that_is_put_into_a_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "wares_for_a_test"
    package.mkdir()
    for name, text in (("__init__", ""), ("b", "WARE = 2"), ("a", "WARE = 1"), ("c", "OTHER = 3")):
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(offers(importlib.import_module("wares_for_a_test"), "WARE")) == [1, 2]


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/qswin-was-here", "w"))


def save(tmp_path, content):
    file = tmp_path / "a.pth"
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: save(p, Evil()), "pickled code"),
        (lambda p: save(p, {"model": Evil()}), "pickled code"),
        (lambda p: save(p, {"weight": torch.zeros(3)}), "foreign"),
        (lambda p: save(p, {}), "foreign"),
        (lambda p: save(p, [1, 2]), "not a checkpoint but a list"),
        (lambda p: save(p, small_swin(embed_dim=32).state_dict()), "has shape"),
        (lambda p: save(p, {k: v for k, v in small_swin().state_dict().items() if "fc2" not in k}), "fc2.*missing"),
        (lambda p: save(p, small_swin(depths=[2, 4]).state_dict()), "of this model"),
    ],
)
def test_checkpoints_that_cannot_be_used_say_why(tmp_path, make, words):
    file = make(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){file}.*({words})"):
        build_model(V1, num_classes=5, checkpoint=file, **SMALL)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    file = tmp_path / f"a{suffix}"
    state = small_swin().state_dict()
    safetensors.torch.save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        read_state(file)


@pytest.mark.parametrize("inner", [None, "state_dict"])
def test_a_state_that_contains_itself_is_refused(tmp_path, inner):
    state = {}
    state["model"] = state if inner is None else {inner: state}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: its weights are wrapped more than 4 deep; save model\.state_dict"):
        read_state(tmp_path / "a.pth")


def test_weights_that_cannot_be_downloaded_name_the_file_option(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model.checkpoint=FILE"):
        build_model(V1, pretrained=True)


def test_vits_are_those_with_plain_blocks():
    names = set(vit.names())
    assert {"vit_tiny_patch16_224", "vit_base_patch32_384", "deit_small_patch16_224", "deit3_base_patch16_224"} <= names
    assert not [name for name in names if "rope" in name or "xp_" in name]


def test_a_vits_preprocessing_is_its_own():
    """ViT normalizes with 0.5, DeiT with ImageNet's mean."""
    values = {
        name: vit.preprocessing(build_model(name, img_size=64))
        for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
    }
    assert values["vit_tiny_patch16_224"]["mean"] == (0.5, 0.5, 0.5)
    assert values["deit_tiny_patch16_224"]["mean"] == (0.485, 0.456, 0.406)
    assert all(value["size"] == (64, 64) for value in values.values())


def test_a_vit_checkpoint_loads(tmp_path):
    model = build_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=1)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = build_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=1, checkpoint=tmp_path / "a.pth")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package that declares a family at `module:FAMILY`; families are looked for again, now and after."""

    def install(place: str) -> None:
        (tmp_path / "elsewhere.py").write_text(
            "from qswin.models import swin\nfrom qswin.models.family import Family\n"
            "FAMILY = Family('elsewhere', 'classification', lambda: ['my_swin'], swin.build, swin.preprocessing)\n"
        )
        (tmp_path / "elsewhere-1.dist-info").mkdir()
        (tmp_path / "elsewhere-1.dist-info" / "METADATA").write_text("Name: elsewhere\nVersion: 1\n")
        (tmp_path / "elsewhere-1.dist-info" / "entry_points.txt").write_text(f"[qswin.families]\nelsewhere = {place}\n")
        monkeypatch.syspath_prepend(tmp_path)

    registry._known.cache_clear()
    yield install
    registry._known.cache_clear()


def test_a_family_of_an_installed_package_is_known(installed):
    installed("elsewhere:FAMILY")
    assert family_of("my_swin").name == "elsewhere" and family_of(V1).name == "swin"


def test_a_package_whose_family_cannot_be_loaded_is_named(installed):
    installed("elsewhere:FAMLY")
    with pytest.raises(ValueError, match="qswin.families: elsewhere = elsewhere:FAMLY cannot be loaded: .*FAMLY"):
        families()
