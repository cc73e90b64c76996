"""The families apart from Swin itself through the whole path, as small random models: ViT, CvT, Swin-Unet."""

import numpy as np
import pytest
import torch

from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.offline import activations
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import disable, enable, quantize
from qswin.qat.training.losses import task_loss
from qswin.trt.engines.build import build_engine
from qswin.trt.engines.options import BuildOptions
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import CVT, VARIANTS, Small

SLOW = pytest.mark.slow
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
    others = {
        "patch_embed",
        "head",
        "layers.0.downsample.reduction",
        "layers_up.0.expand",
        "concat_back_dim.1",
        "up.expand",
    }
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
    find_ranges(twin, [images])
    expected = model(images)
    error = (twin(images) - expected).abs().mean() / expected.std()
    assert 0 < error < 0.1


def test_it_trains(small):
    images, twin = small.images(8), quantize(small.build(), named_recipe("full"))
    find_ranges(twin, [images])
    optimizer = torch.optim.AdamW(twin.train().parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = task_loss(small.task, twin(images), small.targets(8), 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "variant", ["vit, query and key norms", pytest.param("cvt", marks=SLOW), pytest.param("swin-unet", marks=SLOW)]
)
def test_torch_traces_it_without_a_break(variant):
    small = VARIANTS[variant]
    twin, images = quantize(small.build(), named_recipe("full")), small.images()
    find_ranges(twin, [images])
    with torch.no_grad():
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), twin(images), rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize(
    ("variant", "opset"),
    [
        ("vit, registers", 20),
        pytest.param("cvt", 17, marks=SLOW),
        pytest.param("swin-unet", 17, marks=SLOW),
    ],
)
def test_the_exported_graphs_are_right_and_build(variant, opset, tmp_path):
    """FP32 agrees with torch to 1e-4, and so does INT8 node by node; TensorRT-RTX takes FP16 and INT8.

    ONNX Runtime's own INT8 kernels are no reference: on a CPU without VNNI their sums saturate at 16 bits.
    """
    small = VARIANTS[variant]
    recipe, images = named_recipe("full"), small.images()
    twin = quantize(small.build(), recipe)
    find_ranges(twin, [images])
    preprocessing = Preprocessing(size=(small.side, small.side))
    description = Description({"name": small.name}, "ptq", preprocessing, recipe=recipe)
    for precision in ("fp32", "int8"):
        path = tmp_path / f"{precision}.onnx"
        save_onnx(path, export_onnx(twin, description, precision, opset), description.to_dict())
    with torch.no_grad():
        enable(twin)
        quantized = twin(images).numpy()
        disable(twin)
        floating = twin(images).numpy()
    tolerance = 1e-4 * max(1.0, np.abs(floating).max())
    fp32 = OnnxRuntimePredictor(tmp_path / "fp32.onnx")(images.numpy())
    np.testing.assert_allclose(fp32, floating, rtol=1e-4, atol=tolerance)
    int8 = activations("int8.onnx", read_onnx(tmp_path / "int8.onnx"), ["logits"], images.numpy())["logits"]
    # A sum that is rounded otherwise moves the logits of an image here and there; quantization moves nearly all.
    assert np.median(np.abs(int8 - quantized)) < 0.1 * np.median(np.abs(quantized - floating))
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for graph, precision in (("fp32", "fp16"), ("int8", "int8")):
        options = BuildOptions(precision=precision, target="tensorrt-rtx", batch_sizes=(1, 2, 4))
        assert len(build_engine(tmp_path / f"{graph}.onnx", options)[0]) > 10_000
