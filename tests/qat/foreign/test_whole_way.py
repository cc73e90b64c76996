"""A checkpoint of every library through the whole path: PTQ, QAT, ONNX, TensorRT-RTX, our kernels. docs/models.md."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from qswin.calib.data.images import Preprocessing
from qswin.models.registry import build_model, family_of, read_checkpoint
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import Recipe, named_recipe
from qswin.qat.quant.rewrite import disable, quantize, recipe_of
from qswin.qat.training.losses import task_loss
from qswin.trt.engines.build import build_engine
from qswin.trt.engines.options import BuildOptions
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import CVT, UNET, V1, V2, VARIANTS, VIT
from tests.models.checkpoints.openmmlab import OpenMMLabSwin
from tests.models.checkpoints.test_logits import (
    HF_CASES,
    SMALL,
    images,
    lively,
    old_deit_3,
    old_timm,
    save_pretrained,
)
from tests.models.checkpoints.test_logits import torchvision_swin as swin_of_torchvision
from tests.models.test_cvt import microsofts

SLOW = pytest.mark.slow
DISTILLED, DEIT_3 = "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"


class Case(NamedTuple):
    """How a checkpoint is made in a folder, and the model that it is for."""

    make: Callable[[Path], dict[str, torch.Tensor] | None]
    name: str
    settings: dict


def hugging_face(case: str) -> Case:
    kind, theirs, name, settings = HF_CASES[case]

    def make(folder: Path) -> None:
        save_pretrained(kind, folder, **theirs)

    return Case(make, name, settings)


def timms(name: str, **settings) -> nn.Module:
    return lively(timm.create_model(name, num_classes=5, **settings))


def vit_of_torchvision(folder: Path) -> dict[str, torch.Tensor]:
    return lively(torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5)).state_dict()


def cvt_of_transformers(folder: Path) -> None:
    save_pretrained("Cvt", folder, **CVT)


WINDOWED = {"window_size": 4, **SMALL}
CASES = {
    "torchvision swin": Case(lambda _: swin_of_torchvision(False).state_dict(), V1, SMALL),
    "torchvision swin v2": Case(lambda _: swin_of_torchvision(True).state_dict(), V2, SMALL),
    "torchvision vit": Case(vit_of_torchvision, "vit_tiny_patch16_224", VIT),
    "hugging face swin": hugging_face("swin"),
    "hugging face swin v2": hugging_face("swin v2, pretrained windows"),
    "hugging face vit": hugging_face("vit"),
    "hugging face deit": hugging_face("deit"),
    "hugging face deit with teacher": hugging_face("deit with teacher"),
    "openmmlab swin": Case(lambda _: lively(OpenMMLabSwin(16, [2, 2], [2, 4], 4, 5)).state_dict(), V1, SMALL),
    "timm swin": Case(lambda _: timms(V1, **WINDOWED).state_dict(), V1, WINDOWED),
    "timm swin v2": Case(lambda _: timms(V2, **WINDOWED).state_dict(), V2, WINDOWED),
    "timm vit": Case(lambda _: timms("vit_tiny_patch16_224", **VIT).state_dict(), "vit_tiny_patch16_224", VIT),
    "timm before 0.9": Case(lambda _: old_timm(timms(V1, **WINDOWED)), V1, WINDOWED),
    "timm before 0.9, v2": Case(lambda _: old_timm(timms(V2, **WINDOWED)), V2, WINDOWED),
    "deit 3": Case(lambda _: old_deit_3(timms(DEIT_3, **VIT)), DEIT_3, VIT),
    "hugging face cvt": Case(cvt_of_transformers, "cvt-13", CVT),
    "microsoft cvt": Case(
        lambda _: microsofts(VARIANTS["cvt"].build().state_dict()), "cvt-13", {**CVT, "activation": "quick_gelu"}
    ),
    "swin-unet": Case(
        lambda _: {f"swin_unet.{key}": value for key, value in VARIANTS["swin-unet"].build().state_dict().items()},
        "swin_unet_tiny_patch4_window7_224",
        UNET,
    ),
    "deit with two heads": Case(lambda _: timms(DISTILLED, **VIT).state_dict(), DISTILLED, VIT),
}


@pytest.fixture(params=[pytest.param(case, marks=() if case == "torchvision swin" else SLOW) for case in CASES])
def model(request, tmp_path) -> tuple[nn.Module, dict]:
    """A model with the weights of a checkpoint, and what builds it again."""
    case = CASES[request.param]
    state = case.make(tmp_path)
    if state is not None:
        torch.save(state, tmp_path / "a.pth")
    path = tmp_path if state is None else tmp_path / "a.pth"
    weights = read_checkpoint(case.name, path)
    settings = {**weights.settings, **case.settings}
    return build_model(case.name, 5, weights, **case.settings), {"name": case.name, "num_classes": 5, **settings}


def calibrated(model: nn.Module, recipe: Recipe) -> nn.Module:
    twin = quantize(model, recipe).eval()
    find_ranges(twin, [images(8)])
    return twin


@torch.no_grad()
def test_ptq(model):
    expected = model[0](images(8))
    error = (calibrated(model[0], named_recipe("gemm"))(images(8)) - expected).abs().mean() / expected.std()
    assert 0 < error < 0.1


@SLOW
def test_qat(model):
    twin = calibrated(model[0], named_recipe("full")).train()
    task, optimizer = family_of(model[1]["name"]).task, torch.optim.AdamW(twin.parameters(), 1e-3)
    targets = torch.arange(8) % 5
    if task == "segmentation":
        targets = targets.view(8, 1, 1).expand(8, 32, 32)
    losses = []
    for _ in range(4):
        loss = task_loss(task, twin(images(8)), targets, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def write_onnx(twin: nn.Module, settings: dict, path: Path, precision: str) -> None:
    description = Description(settings, "ptq", Preprocessing(size=(32, 32)), recipe=recipe_of(twin))
    save_onnx(path, export_onnx(twin, description, precision, 20), description.to_dict())


@SLOW
def test_onnx(model, tmp_path):
    """The float graph computes what the model does. In the INT8 graph, sites of one tensor share a pair of Q and DQ."""
    twin = calibrated(model[0], named_recipe("attention"))
    write_onnx(twin, model[1], tmp_path / "int8.onnx", "int8")
    operators = [node.op_type for node in read_onnx(tmp_path / "int8.onnx").graph.node]
    activations = {quantizer.site for quantizer in quantizers(twin) if quantizer.weight_shape is None}
    assert operators.count("QuantizeLinear") > len(activations) / 2 > 5
    write_onnx(twin, model[1], tmp_path / "fp32.onnx", "fp32")
    disable(twin, quiet=True)
    with torch.no_grad():
        expected = twin(images()).numpy()
    found = OnnxRuntimePredictor(tmp_path / "fp32.onnx")(images().numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@SLOW
def test_tensorrt_rtx(model, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    write_onnx(calibrated(model[0], named_recipe("attention")), model[1], tmp_path / "int8.onnx", "int8")
    options = BuildOptions(precision="int8", target="tensorrt-rtx", batch_sizes=(1, 2, 4))
    assert len(build_engine(tmp_path / "int8.onnx", options)[0]) > 10_000


@torch.inference_mode()
def test_kernels(model):
    """Their references, which are what runs on a CPU; of Swin and ViT, which they are for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from qswin.qat.lowering.lower import lower

    if family_of(model[1]["name"]).name not in ("swin", "vit"):
        pytest.skip("the kernels are for classifiers of Swin and ViT")
    twin = calibrated(model[0], named_recipe("attention"))
    expected, found = twin(images()), lower(twin, images()[:1])(images())
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
