"""ViT and DeiT through the whole path, with every kind of head that they have."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib.images import Preprocessing
from models.registry import build_model
from qat.checkpoint import Description
from qat.export import export_onnx, save_onnx
from qat.ptq import calibrate
from qat.quantizers import quantizers
from qat.recipe import named_recipe
from qat.rewrite import disable, enable, quantize
from trt.build import BuildOptions, build_engine
from trt.onnx_runtime import OnnxRuntimePredictor

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VARIANTS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average pooling": ("vit_medium_patch16_gap_256", {}),
    "layer scale, no class token position": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "query and key norms": ("deit_tiny_patch16_224", {"qk_norm": True, "patch_size": 4, "img_size": 24}),
}


def tiny_vit(name: str = "vit_tiny_patch16_224", **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, **{**TINY, **settings})
    for name, parameter in model.named_parameters():  # tokens and layer scales start near 0; trained, they do not stay there
        mean = parameter.detach().mean().item()
        torch.nn.init.normal_(parameter, mean, 1.0 if name.endswith(("token", "pos_embed")) else 0.1)
    return model


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def vit(request) -> torch.nn.Module:
    name, settings = request.param
    return tiny_vit(name, **settings)


def some_images(model: torch.nn.Module, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def test_a_twin_computes_what_timm_computes(vit):
    """Outputs and gradients, timm's being those of its fused attention."""
    twin, images = quantize(vit, named_recipe("full")), some_images(vit)
    torch.testing.assert_close(twin(images), vit(images), rtol=1e-4, atol=1e-5)
    for model in (vit, twin):
        model(images).square().sum().backward()
    expected = dict(vit.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3)


def test_every_site_is_there():
    sites = {quantizer.site.removesuffix(".weight") for quantizer in quantizers(quantize(tiny_vit(), named_recipe("full")))}
    linears = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    block = linears | {f"attn.{x}" for x in ("q", "k", "probs", "v")}
    block |= {f"{add}.{x}" for add in ("add1", "add2") for x in ("shortcut", "branch")}
    assert sites == {"patch_embed", "head"} | {f"blocks.{i}.{site}" for i in range(2) for site in block}


def test_keys_are_timms_plus_the_ranges(vit):
    keys = set(quantize(vit, named_recipe("full")).state_dict())
    assert {key.rsplit(".", 1)[1] for key in keys - set(vit.state_dict())} == {"_amax"}


@torch.no_grad()
def test_calibrated_it_loses_little(vit):
    images, twin = some_images(vit, 8), quantize(vit, named_recipe("gemm"))
    calibrate(twin, [images])
    expected = vit(images)
    error = (twin(images) - expected).abs().mean() / expected.std()
    assert 0 < error < 0.1


def test_it_trains(vit):
    images, twin = some_images(vit, 8), quantize(vit, named_recipe("full"))
    calibrate(twin, [images])
    optimizer = torch.optim.AdamW(twin.train().parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(twin(images), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_torch_traces_it_without_a_break():
    vit = tiny_vit("deit_tiny_patch16_224", qk_norm=True)
    twin, images = quantize(vit, named_recipe("full")), some_images(vit)
    calibrate(twin, [images])
    with torch.no_grad():
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), twin(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["average pooling", "registers"])
def test_the_exported_graphs_are_right_and_build(variant, tmp_path):
    """FP32 agrees with torch to 1e-4, and INT8 better than with the float model; TensorRT-RTX takes FP16 and INT8."""
    name, settings = VARIANTS[variant]
    vit = tiny_vit(name, **settings)
    recipe, images = named_recipe("full"), some_images(vit)
    twin = quantize(vit, recipe)
    calibrate(twin, [images])
    side = vit.patch_embed.img_size
    description = Description({"name": "vit"}, "ptq", Preprocessing(size=side), recipe=recipe)
    predictors = {}
    for precision in ("fp32", "int8"):
        path = tmp_path / f"{precision}.onnx"
        save_onnx(path, export_onnx(twin, description, precision), description.to_dict())
        predictors[precision] = OnnxRuntimePredictor(path)
    with torch.no_grad():
        enable(twin)
        quantized = twin(images).numpy()
        disable(twin)
        floating = twin(images).numpy()
    np.testing.assert_allclose(predictors["fp32"](images.numpy()), floating, rtol=1e-4, atol=1e-4)
    exported = predictors["int8"](images.numpy())
    assert np.abs(exported - quantized).mean() < 0.5 * np.abs(quantized - floating).mean()
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for graph, precision in (("fp32", "fp16"), ("int8", "int8")):
        options = BuildOptions(precision=precision, target="tensorrt-rtx", profile=(1, 2, 4))
        assert len(build_engine(tmp_path / f"{graph}.onnx", options)[0]) > 10_000
