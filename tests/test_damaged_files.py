"""Images, checkpoints, sidecars and graphs with bytes changed or cut: read, or refused by a line naming the file."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qswin.calib.data.images import Preprocessing, load_image
from qswin.calib.files import sidecar_path
from qswin.models.checkpoints.state_dicts import read_state
from qswin.qat.checkpoint import read_description, save_checkpoint
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.quant.recipe import named_recipe
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import DESCRIPTION, small_swin, twin_of

Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw) -> Damage:
    """Up to six bytes changed, most of them near the beginning, where the formats' structure is; some cut short."""
    place = st.one_of(st.integers(0, 400), st.integers(0, 1 << 20))
    changes = draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6))
    keep = draw(st.one_of(st.just(1.0), st.floats(0, 1)))

    def damage(content: bytes) -> bytes:
        damaged = bytearray(content)
        for place, value in changes:
            damaged[place % len(damaged)] = value
        return bytes(damaged[: int(keep * len(damaged))])

    return damage


def read_or_refused(read: Callable, path, named) -> None:
    try:
        read(path)
    except ValueError as error:
        assert str(named) in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "gif", "tiff", "webp", "ppm"])
@settings(max_examples=60)
@given(damage=damages())
def test_images(folder, kind, damage):
    data, path = io.BytesIO(), folder / f"x.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(data, kind)
    path.write_bytes(damage(data.getvalue()))
    read_or_refused(lambda path: load_image(path, Preprocessing(size=(16, 16))), path, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@settings(max_examples=150)
@given(damage=damages())
def test_checkpoints(folder, suffix, damage):
    state, whole, path = (
        {"a.weight": torch.ones(3, 2), "b": torch.zeros(4)},
        folder / f"whole{suffix}",
        folder / f"x{suffix}",
    )
    safetensors.torch.save_file(state, whole) if suffix == ".safetensors" else torch.save(
        {"model": state, "epoch": 3}, whole
    )
    path.write_bytes(damage(whole.read_bytes()))
    read_or_refused(read_state, path, path)


@pytest.fixture(scope="module")
def sidecar(folder):
    """A checkpoint's sidecar, and its content."""
    twin = twin_of(torch.randn(2, 3, 32, 32), "full", depths=[2, 1])
    save_checkpoint(folder / "c.safetensors", twin, dataclasses.replace(DESCRIPTION, recipe=named_recipe("full")))
    path = sidecar_path(folder / "c.safetensors")
    return path, path.read_bytes()


@settings(max_examples=150)
@given(damage=damages())
def test_sidecars(folder, sidecar, damage):
    path, content = sidecar
    path.write_bytes(damage(content))
    read_or_refused(read_description, folder / "c.safetensors", "c.safetensors")


@pytest.fixture(scope="module")
def graph(folder):
    path = folder / "whole.onnx"
    save_onnx(path, export_onnx(small_swin(depths=[1, 1]), DESCRIPTION, "fp32"), DESCRIPTION.to_dict())
    return path.read_bytes()


@settings(max_examples=60)
@given(damage=damages())
def test_graphs(folder, graph, damage):
    path = folder / "x.onnx"
    path.write_bytes(damage(graph))
    read_or_refused(OnnxRuntimePredictor, path, path)
