"""Backbones and windows at any image size, against the libraries whose way of padding they take."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from qswin.models.backbones.windows import SHIFTS, Windows
from qswin.models.registry import build_model, read_checkpoint
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import V1, V2
from tests.models.checkpoints.openmmlab import OpenMMLabSwin
from tests.models.checkpoints.test_logits import HF_SWIN, SMALL, lively, torchvision_swin

STAGES = ["stage1", "stage2"]
SIZES = [(32, 32), (44, 36), (50, 62), (36, 20), (16, 8)]  # multiples of windows of 4 x 2 pixels, and others


def assert_same_maps(model: nn.Module, expected: list[torch.Tensor], batch: torch.Tensor) -> None:
    """Of the model, and of its twin without quantizers; and not because the maps are all alike."""
    for each in (model, quantize(model, named_recipe("none"))):
        with torch.no_grad():
            found = each(batch)
        assert list(found) == STAGES
        for ours, theirs in zip(found.values(), expected, strict=True):
            assert theirs.std() > 0.01 * theirs.abs().max()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def batch(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [*SIZES, (45, 37)], ids=str)
@pytest.mark.parametrize("name", [V1, V2])
def test_torchvisions(tmp_path, name, size):
    theirs = torchvision_swin(name == V2)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = build_model(name, checkpoint=tmp_path / "a.pth", out_features=STAGES, **SMALL)
    maps, x = [], batch(size)
    with torch.no_grad():
        for index, part in enumerate(theirs.features):
            x = part(x)
            maps += [x.permute(0, 3, 1, 2)] if index in (1, 3) else []
    assert_same_maps(ours, maps, batch(size))


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_hugging_faces(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**HF_SWIN, out_features=STAGES)
    lively(getattr(transformers, f"{kind}Backbone")(config)).save_pretrained(tmp_path)
    settings = {key: value for key, value in SMALL.items() if key != "img_size"}
    ours = build_model(V1 if kind == "Swin" else V2, checkpoint=tmp_path, out_features=STAGES, **settings)
    for size in (*SIZES[:3], (45, 37)):  # transformers' windows do not fit smaller ones
        theirs = getattr(transformers, f"{kind}Backbone").from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = theirs(batch(size)).feature_maps
        assert_same_maps(ours, list(expected), batch(size))


def test_hugging_faces_classifier_at_another_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = lively(transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=5, **HF_SWIN)))
    theirs.save_pretrained(tmp_path)
    settings = {key: value for key, value in SMALL.items() if key != "img_size"}
    ours = build_model(V1, 5, tmp_path, img_size=[44, 36], **settings)
    with torch.no_grad():
        expected = theirs(batch((44, 36))).logits
        for model in (ours, quantize(ours, named_recipe("none"))):
            torch.testing.assert_close(
                model(batch((44, 36))), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
            )
        timms = build_model(V1, 5, tmp_path, img_size=[44, 36], padding="timm", **settings)
        assert (timms(batch((44, 36))) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_mmdetections_with_its_norms(tmp_path):
    theirs = lively(OpenMMLabSwin(16, [2, 2], [2, 4], 4, 5, norms=2)).backbone
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = build_model(V1, checkpoint=tmp_path / "a.pth", out_features=STAGES, **SMALL)
    x = batch((48, 48))
    x, maps = theirs.patch_embed.norm(theirs.patch_embed.projection(x).permute(0, 2, 3, 1)), []
    with torch.no_grad():
        for index, stage in enumerate(theirs.stages):
            for block in stage.blocks:
                x = block(x)
            maps.append(theirs.get_submodule(f"norm{index}")(x).permute(0, 3, 1, 2))
            x = x if stage.downsample is None else stage.downsample(x)
    assert_same_maps(ours, maps, batch((48, 48)))


@pytest.mark.parametrize("name", [V1, V2])
def test_timms_at_any_size(name):
    theirs = lively(timm.create_model(name, features_only=True, strict_img_size=False, out_indices=(0, 1), **SMALL))
    twin = quantize(theirs, named_recipe("none"))
    for size in SIZES:
        with torch.no_grad():
            for ours, expected in zip(twin(batch(size)), theirs(batch(size)), strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_swin_unets_encoder_at_any_size():
    name, settings = "swin_unet_tiny_patch4_window7_224", {key: SMALL[key] for key in SMALL if key != "img_size"}
    settings |= {"img_size": 32, "window_size": 4}
    whole = lively(build_model(name, 5, **settings))
    encoder = build_model(name, out_features=STAGES, **settings)
    encoder.load_state_dict({key: value for key, value in whole.state_dict().items() if key in encoder.state_dict()})
    seen = []
    for stage in whole.layers:
        stage.blocks.register_forward_hook(lambda _, __, output: seen.append(output.permute(0, 3, 1, 2)))
    with torch.no_grad():
        whole(batch((32, 32)))
    assert_same_maps(encoder, seen, batch((32, 32)))
    with torch.no_grad():
        maps = encoder(batch((44, 36)))
    assert [tuple(each.shape) for each in maps.values()] == [(2, 16, 22, 18), (2, 32, 11, 9)]


def test_masks_are_timms():
    for side in ((8, 12), (9, 7), (16, 16)):
        block = SwinTransformerBlock(8, side, num_heads=2, window_size=4, shift_size=2, always_partition=True)
        mask = Windows.of(block).mask(*side, block.norm1.weight.detach())
        torch.testing.assert_close(mask, block.attn_mask, rtol=0, atol=0)


@pytest.mark.parametrize("padding", SHIFTS)
def test_joining_undoes_cutting(padding):
    x = torch.randn(2, 9, 14, 3)
    windows = Windows((4, 5), (2, 1), padding)
    cut = windows.cut(x)
    assert cut.shape == (2 * 3 * 3, 20, 3)
    torch.testing.assert_close(windows.join(cut, 9, 14), x, rtol=0, atol=0)


def test_what_a_backbone_says_of_itself(tmp_path):
    backbone = build_model(V1, out_features=["stage2"], **SMALL)
    assert (backbone.channels, backbone.strides, backbone.num_classes) == ({"stage2": 32}, {"stage2": 4}, 0)
    whole = build_model(V1, 5, **SMALL)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        found = build_model(V1, checkpoint=tmp_path / "a.pth", out_features=["stage2"], **SMALL)(batch((32, 32)))
        expected = whole.layers(whole.patch_embed(batch((32, 32)))).permute(0, 3, 1, 2)
    torch.testing.assert_close(found["stage2"], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_features": ["stage5"]}, "'stage5' is not among stage1, stage2"),
        ({"out_features": []}, "is empty; choose of stage1, stage2"),
        ({"padding": "keras"}, "padding='keras' is not one of timm, torchvision"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(V1, **SMALL, **settings)


def test_a_source_says_how_it_pads(tmp_path):
    torch.save(torchvision_swin(False).state_dict(), tmp_path / "a.pth")
    assert read_checkpoint(V1, tmp_path / "a.pth").settings["padding"] == "torchvision"
