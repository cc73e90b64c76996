"""The families apart from Swin itself through the whole path, as small random models: ViT, CvT, Swin-Unet."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from calib.images import Preprocessing
from models.registry import build_model, family_of
from qat.checkpoint import Description
from qat.export import export_onnx, save_onnx
from qat.losses import task_loss
from qat.ptq import calibrate
from qat.quantizers import quantizers
from qat.recipe import named_recipe
from qat.rewrite import disable, enable, quantize
from trt.build import BuildOptions, build_engine
from trt.onnx_runtime import OnnxRuntimePredictor

CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CVT = {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}
UNET = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}


class Small(NamedTuple):
    """A small model: the name it is a variant of, and its settings."""

    name: str
    settings: dict
    side: int = 32

    def build(self) -> nn.Module:
        """Random weights, but of sizes that training leads to: tokens and layer scales start near 0, batch norms empty."""
        torch.manual_seed(0)
        model = build_model(self.name, num_classes=CLASSES, **self.settings)
        for name, parameter in model.named_parameters():
            mean = parameter.detach().mean().item()
            nn.init.normal_(parameter, mean, 1.0 if name.endswith(("token", "pos_embed")) else 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
        return model

    def images(self, count: int = 4) -> torch.Tensor:
        return torch.randn(count, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))

    def targets(self, count: int) -> torch.Tensor:
        shape = (count, self.side, self.side) if self.task == "segmentation" else (count,)
        return torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(2))

    @property
    def task(self) -> str:
        return family_of(self.name).TASK


VARIANTS = {
    "vit, class token": Small("vit_tiny_patch16_224", VIT),
    "vit, average pooling": Small("vit_medium_patch16_gap_256", VIT),
    "vit, layer scale, no class token position": Small("deit3_small_patch16_224", VIT),
    "vit, registers": Small("vit_small_patch14_reg4_dinov2", VIT),
    "vit, query and key norms": Small(
        "deit_tiny_patch16_224", {**VIT, "qk_norm": True, "patch_size": 4, "img_size": 24}, 24
    ),
    "cvt": Small("cvt-13", CVT),
    "cvt, no class token": Small("cvt-21", {**CVT, "cls_token": [False, False, False], "activation": "quick_gelu"}, 48),
    "swin-unet": Small("swin_unet_tiny_patch4_window7_224", UNET),
}
ADDS = {f"{add}.{x}" for add in ("add1", "add2") for x in ("shortcut", "branch")}
ATTENTION = {f"attn.{x}" for x in ("q", "k", "probs", "v", "proj")} | {"mlp.fc1", "mlp.fc2"} | ADDS


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def small(request) -> Small:
    return request.param


def test_a_twin_computes_what_the_float_model_computes(small):
    """Outputs and gradients; ViT's are those of timm's fused attention. A folded convolution's gradient is another."""
    model = small.build()
    twin, images = quantize(model, named_recipe("full")), small.images()
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-4)
    for network in (model, twin):
        network(images).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if ".convolution_projection." not in name:
            scale = expected[name].grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3 * max(1.0, scale))


def sites_of(variant: str) -> set[str]:
    twin = quantize(VARIANTS[variant].build(), named_recipe("full"))
    return {quantizer.site.removesuffix(".weight") for quantizer in quantizers(twin)}


def test_every_site_of_vit_is_there():
    block = ATTENTION | {"attn.qkv"}
    assert sites_of("vit, class token") == {"patch_embed", "head"} | {
        f"blocks.{i}.{site}" for i in range(2) for site in block
    }


def test_every_site_of_cvt_is_there():
    parts = ("query", "key", "value")
    layer = ATTENTION | {f"attn.qkv.{x}" for x in parts} | {f"attn.conv.{x}" for x in parts}
    layers = [f"stages.{stage}.layers.{i}" for stage, depth in enumerate(CVT["depth"]) for i in range(depth)]
    embeddings = {f"stages.{stage}.patch_embed" for stage in range(3)}
    assert sites_of("cvt") == {"head"} | embeddings | {f"{name}.{site}" for name in layers for site in layer}


def test_every_site_of_swin_unet_is_there():
    stages = ("layers.0", "layers.1", "layers_up.1")
    blocks = {f"{stage}.blocks.{i}.{site}" for stage in stages for i in range(2) for site in ATTENTION | {"attn.qkv"}}
    others = {"patch_embed", "head", "layers.0.downsample.reduction", "layers_up.0.expand", "concat_back_dim.1", "up.expand"}
    assert sites_of("swin-unet") == others | blocks


def test_keys_are_the_float_models_plus_the_ranges(small):
    """CvT's batch norms are gone, and their convolutions have biases instead."""
    model = small.build()
    ours, floating = set(quantize(model, named_recipe("full")).state_dict()), set(model.state_dict())
    assert {key.rsplit(".", 1)[1] for key in ours - floating if not key.endswith("convolution.bias")} == {"_amax"}
    assert all(".normalization." in key for key in floating - ours)


@torch.no_grad()
def test_calibrated_it_loses_little(small):
    model, images = small.build(), small.images(8)
    twin = quantize(model, named_recipe("gemm"))
    calibrate(twin, [images])
    expected = model(images)
    error = (twin(images) - expected).abs().mean() / expected.std()
    assert 0 < error < 0.1


def test_it_trains(small):
    images, twin = small.images(8), quantize(small.build(), named_recipe("full"))
    calibrate(twin, [images])
    optimizer = torch.optim.AdamW(twin.train().parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = task_loss(small.task, twin(images), small.targets(8), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", ["vit, query and key norms", "cvt", "swin-unet"])
def test_torch_traces_it_without_a_break(variant):
    small = VARIANTS[variant]
    twin, images = quantize(small.build(), named_recipe("full")), small.images()
    calibrate(twin, [images])
    with torch.no_grad():
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), twin(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "opset"), [("vit, registers", 20), ("cvt", 17), ("swin-unet", 17)])
def test_the_exported_graphs_are_right_and_build(variant, opset, tmp_path):
    """FP32 agrees with torch to 1e-4, and INT8 better than with the float model; TensorRT-RTX takes FP16 and INT8."""
    small = VARIANTS[variant]
    recipe, images = named_recipe("full"), small.images()
    twin = quantize(small.build(), recipe)
    calibrate(twin, [images])
    preprocessing = Preprocessing(size=(small.side, small.side))
    description = Description({"name": small.name}, "ptq", preprocessing, recipe=recipe)
    predictors = {}
    for precision in ("fp32", "int8"):
        path = tmp_path / f"{precision}.onnx"
        save_onnx(path, export_onnx(twin, description, precision, opset), description.to_dict())
        predictors[precision] = OnnxRuntimePredictor(path)
    with torch.no_grad():
        enable(twin)
        quantized = twin(images).numpy()
        disable(twin)
        floating = twin(images).numpy()
    largest = np.abs(floating).max()
    np.testing.assert_allclose(predictors["fp32"](images.numpy()), floating, rtol=1e-4, atol=1e-4 * max(1.0, largest))
    exported = predictors["int8"](images.numpy())
    assert np.abs(exported - quantized).mean() < 0.5 * np.abs(quantized - floating).mean()
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for graph, precision in (("fp32", "fp16"), ("int8", "int8")):
        options = BuildOptions(precision=precision, target="tensorrt-rtx", profile=(1, 2, 4))
        assert len(build_engine(tmp_path / f"{graph}.onnx", options)[0]) > 10_000
