"""Fixtures: a small Swin that exercises shifts, masks and merging, folders of images, and the shared assets."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import qswin.models
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import ASSETS, V1, V2, small_swin, write_images

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile(
    "slow machines", deadline=None
)  # how long an example takes says more of the machine than of it
settings.load_profile("slow machines")


def pytest_configure(config):
    tested = Path(qswin.models.__file__).resolve().parent
    if tested != ROOT / "models":
        raise pytest.UsageError(
            f"qswin is imported from {tested.parent}, and these are the tests of {ROOT}; make setup here"
        )
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(
        threads
    )  # of the processes that tests start: sums depend on the number of threads
    config.addinivalue_line("markers", "gpu: needs TensorRT and an NVIDIA GPU")
    config.addinivalue_line("markers", "slow: left out by make test, run by make coverage")
    config.addinivalue_line("markers", "assets: needs the trained models and images of shared/assets")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    find_ranges(twin, [images])
    return twin


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / "data")


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
  equalize: false
train:
  batch_size: 4
  lr: 1.0e-3
  augment:
    scale: [0.7, 1.0]
recipe: full
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
