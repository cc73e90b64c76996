"""Fixtures: a small Swin that exercises shifts, masks and merging, folders of images, and the shared assets."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from calib.folders import ImageFolder
from calib.images import Preprocessing
from models.registry import build_model
from qat.checkpoint import Description
from qat.ptq import calibrate
from qat.recipe import named_recipe
from qat.rewrite import quantize

SMALL = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
DESCRIPTION = Description(  # of what tests/trt/conftest.py exports
    {"name": V1, "num_classes": 5, **SMALL, "depths": [2, 1]},
    "ptq",
    Preprocessing(size=(32, 32)),
    tuple(f"class{i}" for i in range(5)),
)
ASSETS = Path(os.environ.get("QSWIN_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))

settings.register_profile("slow machines", deadline=None)  # how long an example takes says more of the machine than of it
settings.load_profile("slow machines")


def pytest_configure(config):
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start: sums depend on the number of threads
    config.addinivalue_line("markers", "gpu: needs TensorRT and an NVIDIA GPU")
    config.addinivalue_line("markers", "slow: left out by make test, run by make coverage")
    config.addinivalue_line("markers", "assets: needs the trained models and images of shared/assets")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_swin(name: str = V1, seed: int = 0, **settings) -> torch.nn.Module:
    """A small random Swin; V2's zero-initialised norms are filled, as training would."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes=5, **{**SMALL, **settings})
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.1)
    return model


@pytest.fixture(params=[V1, V2], ids=["v1", "v2"])
def swin(request) -> torch.nn.Module:
    return small_swin(request.param)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quantized(images) -> torch.nn.Module:
    """A calibrated small Swin V1 of the full recipe."""
    twin = quantize(small_swin(), named_recipe("full"))
    calibrate(twin, [images])
    return twin


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


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


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


@pytest.fixture
def config_file(tmp_path, data) -> Path:
    """A config for the small Swin over `data`, with a saved float checkpoint as its weights."""
    weights = tmp_path / "weights.pth"
    torch.save(small_swin().state_dict(), weights)
    text = f"""\
model:
  name: {V1}
  num_classes: 5
  checkpoint: {weights}
  kwargs: {{img_size: 32, patch_size: 2, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 4]}}
data:
  root: {data}
  workers: 0
calibration:
  images: 8
  batch_size: 4
train:
  batch_size: 4
  lr: 1.0e-3
  augment:
    scale: [0.7, 1.0]
run: {tmp_path / "run"}
device: cpu
"""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip(f"the shared assets are not at {ASSETS}; set QSWIN_ASSETS to their folder")
    return ASSETS
