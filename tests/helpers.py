"""What several test modules need: small models, folders of images, and running a command."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from torch import nn

from qswin import cli
from qswin.calib.calibrators import Histogram
from qswin.calib.data.folders import ImageFolder
from qswin.calib.data.images import Preprocessing
from qswin.models.registry import build_model, family_of
from qswin.qat.checkpoint import Description
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.layers import QuantLinear
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize

SMALL = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
DESCRIPTION = Description(  # of what tests/trt/conftest.py exports
    {"name": V1, "num_classes": 5, **SMALL, "depths": [2, 1]},
    "ptq",
    Preprocessing(size=(32, 32)),
    tuple(f"class{i}" for i in range(5)),
)
ASSETS = Path(os.environ.get("QSWIN_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
OLD_TIMM = Version(timm.__version__) < Version("1.0.31")
CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CVT = {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}
UNET = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SIDECAR = {"engine_precision": "int8", "preprocessing": {}, "task": "classification", "classes": None}


class Small(NamedTuple):
    """A small model: the name it is a variant of, and its settings."""

    name: str
    settings: dict
    side: int = 32

    def build(self) -> nn.Module:
        """Random weights of sizes that training leads to: tokens and layer scales start near 0, batch norms empty."""
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
        return family_of(self.name).task


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


def small_swin(name: str = V1, seed: int = 0, **settings) -> torch.nn.Module:
    """A small random Swin; V2's zero-initialised norms are filled, as training would. Skips if timm cannot build it."""
    settings = {**SMALL, **settings}
    if name == V2 and OLD_TIMM and settings["img_size"] // settings["patch_size"] % settings["window_size"]:
        pytest.skip("timm before 1.0.31 cannot build a SwinV2 whose tokens do not fill its windows")
    torch.manual_seed(seed)
    model = build_model(name, num_classes=5, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.1)
    return model


def write_images(root: Path, classes: int = 5, each: int = 4, side: int = 40, seed: int = 0) -> Path:
    """train/ and val/ folders of random images whose mean colour tells their class."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(each):
                pixels = rng.integers(0, 128, (side, side, 3)) + 127 * label // classes
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def write_shards(folder: ImageFolder, root: Path, each: int = 6) -> Path:
    """The images of a class folder as WebDataset shards, by the library's writer; skips where it is not installed."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root.mkdir(parents=True)
    with webdataset.ShardWriter(str(root / "images-%03d.tar"), maxcount=each, verbose=0) as writer:
        for index, (path, label) in enumerate(folder.samples):
            writer.write({"__key__": f"n{index:05d}", "png": path.read_bytes(), "cls": label})
    return root


def write_masks(root: Path, side: int = 16, volumes: int = 2, slices: int = 3) -> Path:
    """train/ and val/ folders of slices whose left and right squares are the classes 1 and 2, and classes.txt."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for name in (f"case{volume}_slice_{index}.png" for volume in range(volumes) for index in range(slices)):
            mask = np.zeros((side, side), dtype=np.uint8)
            top, height = rng.integers(0, side // 2, 2)
            mask[top : top + height, : side // 4], mask[top : top + height, -side // 4 :] = 1, 2
            Image.fromarray(mask).save(root / split / "masks" / name)
            pixels = rng.integers(0, 80, mask.shape) + 80 * mask
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / name)
    (root / "classes.txt").write_text("background\nleft\nright\n")
    return root


def lively_swin() -> torch.nn.Module:
    """A small Swin whose blocks and head matter, as a trained one's do."""
    model = small_swin()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def twin_of(images, recipe="attention", **settings):
    twin = quantize(small_swin(**settings), named_recipe(recipe) if isinstance(recipe, str) else recipe).eval()
    find_ranges(twin, [images])
    return twin


def scale_channels(twin: nn.Module, images: torch.Tensor, *names: str) -> list[str]:
    """Gives layers random channel scales, their weights being divided by them, and finds the ranges again.

    Args:
        names: what the layers' paths end with.

    Returns:
        The layers' paths.
    """
    layers = {path: m for path, m in twin.named_modules() if isinstance(m, QuantLinear) and path.endswith(names)}
    for layer in layers.values():
        scale = torch.exp2(2 * torch.rand(layer.in_features) - 1)
        layer._input_quantizer._pre_quant_scale = scale
        layer.weight.data /= scale
    find_ranges(twin, [images])
    return list(layers)


def filled(*chunks: np.ndarray) -> Histogram:
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram


def invoke(command: str, *arguments) -> int:
    """Runs a command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.run_command(command, [*map(str, arguments)])
    return stop.value.code or 0


def fails(capsys, command: str, *arguments) -> str:
    """The one line that a failing command prints; the exit code is 2."""
    capsys.readouterr()
    assert invoke(command, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"qswin {command}: error: ")
    return lines[0]
