"""Swin-Unet: the trained model's Dice, the published layout, patch expanding against a loop."""

import numpy as np
import pytest
import torch

from qswin.calib.data.batches import Batch
from qswin.models.registry import build_model
from qswin.models.swin_unet import PatchExpand
from qswin.trt.evaluation.segmentation import Dice
from tests.helpers import UNET, VARIANTS

NAME = "swin_unet_tiny_patch4_window7_224"


@pytest.mark.slow
@pytest.mark.assets
def test_the_trained_models_dice_is_what_its_readme_says(assets):
    """On every eighth slice; all 194 of them score 0.8952."""
    model = build_model(NAME, 4, assets / "swin_unet_acdc.safetensors")
    slices = np.load(assets / "acdc_slices.npz")
    images, masks = slices["val_image"][::8], slices["val_label"][::8]
    pixels = (torch.from_numpy(images).float() / 255 - 0.5) / 0.25
    metric = Dice(("background", "right ventricle", "myocardium", "left ventricle"))
    with torch.inference_mode():
        logits = model(pixels.unsqueeze(1).expand(-1, 3, -1, -1)).numpy()
    metric.update(logits, Batch(images, masks, []))
    assert metric.result()["dice"] == pytest.approx(0.8952, abs=0.02)


def test_the_published_wrapping_loads(tmp_path):
    """The published code stores its model as `swin_unet`, with masks and indices."""
    state = VARIANTS["swin-unet"].build().state_dict()
    wrapped = {f"swin_unet.{key}": value for key, value in state.items()}
    wrapped["swin_unet.layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    wrapped["swin_unet.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    torch.save(wrapped, tmp_path / "a.pth")
    model = build_model(NAME, 5, tmp_path / "a.pth", **UNET)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [2, 4])
def test_patch_expanding_is_the_published_rearrangement(scale):
    """'b h w (p1 p2 c) -> b (h p1) (w p2) c', token by token."""
    module, x = PatchExpand(6, scale, 3), torch.randn(2, 3, 4, 6)
    expanded, out = module.expand(x), module(x)
    assert out.shape == (2, 3 * scale, 4 * scale, 3)
    for row in range(3 * scale):
        for column in range(4 * scale):
            part = (row % scale * scale + column % scale) * 3
            token = expanded[:, row // scale, column // scale, part : part + 3]
            torch.testing.assert_close(out[:, row, column], module.norm(token))


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="img_size 40.*multiple of 32"):
        build_model(NAME, img_size=40)
    with pytest.raises(ValueError, match="no published weights.*model.checkpoint=FILE"):
        build_model(NAME, pretrained=True)
