"""Lowered ViTs against the fake-quantized ones, which round at the same places."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.models.registry import build_model  # noqa: E402
from qswin.qat.lowering.layers import LoweredHead, LoweredPatchProjection  # noqa: E402
from qswin.qat.lowering.lower import lower  # noqa: E402
from qswin.qat.lowering.vit import LoweredViTBlock  # noqa: E402
from qswin.qat.ptq.ranges import find_ranges  # noqa: E402
from qswin.qat.quant.recipe import named_recipe  # noqa: E402
from qswin.qat.quant.rewrite import quantize  # noqa: E402
from tests.helpers import scale_channels  # noqa: E402

TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = LoweredViTBlock | LoweredPatchProjection | LoweredHead


def twin_of(name, images, recipe="attention", **settings):
    torch.manual_seed(0)
    model = build_model(name, **(TINY | settings)).eval()
    for parameter in model.parameters():  # else biases are zeros, and layer scales all the same
        parameter.data += 0.02 * torch.randn_like(parameter)
    twin = quantize(model, named_recipe(recipe)).eval()
    find_ranges(twin, [images])
    return twin


@pytest.mark.parametrize(
    ("name", "settings", "recipe"),
    [
        ("deit_tiny_patch16_224", {}, "attention"),
        ("vit_tiny_patch16_224", {"img_size": 80}, "attention"),  # 101 tokens
        ("deit3_small_patch16_224", {"init_values": 0.1}, "attention-fp8"),  # layer scales
        ("deit_tiny_distilled_patch16_224", {}, "attention"),  # two heads
        ("vit_base_patch32_clip_224", {}, "attention"),  # a norm before the blocks
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "attention"),
    ],
)
def test_the_lowered_model_computes_what_the_twin_does(name, settings, recipe):
    images = torch.randn(3, 3, *2 * (settings.get("img_size", 48),))
    twin = twin_of(name, images, recipe, **settings)
    assert_computes_the_same(lower(twin, images[:1]), twin, images, heads=2 if "distilled" in name else 1)


def test_channel_scales_are_folded_into_norms_and_epilogues():
    images = torch.randn(3, 3, 48, 48)
    twin = twin_of("deit_tiny_patch16_224", images)
    assert len(scale_channels(twin, images, "qkv", "fc1", "fc2", "head")) == 2 * 3 + 1
    assert_computes_the_same(lower(twin, images[:1]), twin, images, heads=1)


def assert_computes_the_same(lowered, twin, images, heads):
    """Part by part on the twin's own inputs, and then the logits."""
    inputs = {}
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.inference_mode():
        expected, found = twin(images), lowered(images)
        replaced = [name for name, module in lowered.named_modules() if isinstance(module, KINDS)]
        assert len(replaced) == 2 + 1 + heads
        for name in replaced:
            theirs, ours = (model.get_submodule(name)(inputs[name]) for model in (twin, lowered))
            assert (ours - theirs).abs().mean() < 2e-3 * theirs.abs().mean(), name
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_what_the_kernels_lack_is_refused_by_name():
    images = torch.randn(2, 3, 48, 48)
    twin = twin_of("vit_tiny_patch16_224", images, qk_norm=True)
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn\.q_norm: the kernels have no norm there"):
        lower(twin, images[:1])
    twin = twin_of("vit_tiny_patch16_224", torch.randn(1, 3, 296, 296), img_size=296)
    with pytest.raises(
        ValueError, match=r"^blocks\.0\.attn is over 1370 tokens at once; its kernel takes at most 1280"
    ):
        lower(twin, torch.randn(1, 3, 296, 296))
