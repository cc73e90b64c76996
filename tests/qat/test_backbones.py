"""A backbone through the commands, in a user's own loop, and on the kernels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.session import Session
from qswin.models.registry import build_model
from qswin.qat.checkpoint import Description, load_checkpoint
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.trt.engines.build import build_engine
from qswin.trt.engines.options import BuildOptions
from tests.helpers import SMALL, V1, V2, fails, invoke

STAGES = ["stage1", "stage2"]
SETTINGS = {**SMALL, "depths": [2, 1], "out_features": STAGES}


@pytest.fixture
def config(tmp_path) -> Path:
    """Of a backbone that takes images of 44 x 36, over images of other sizes, one of which is not annotated."""
    folder, rng = tmp_path / "data" / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(9):
        pixels = rng.integers(0, 256, (60 + 4 * index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": 50, "height": 60 + 4 * i} for i in range(8)]
    (folder / "annotations.json").write_text(json.dumps({"images": images}))
    torch.manual_seed(0)
    torch.save(build_model(V1, **SETTINGS).state_dict(), tmp_path / "weights.pth")
    settings = json.dumps({key: value for key, value in SETTINGS.items() if key != "img_size"})
    text = f"""\
model: {{name: {V1}, checkpoint: {tmp_path / "weights.pth"}, kwargs: {settings}}}
data: {{root: {tmp_path / "data"}, workers: 0, preprocessing: {{size: [44, 36]}}}}
calibration: {{images: 6, batch_size: 2}}
recipe: attention
run: {tmp_path / "run"}
device: cpu
"""
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


@pytest.mark.slow
def test_it_is_calibrated_exported_for_sizes_and_compared(config, tmp_path, capsys):
    assert invoke("calibrate", "--config", config) == 0
    checkpoint = tmp_path / "run" / "ptq.safetensors"
    model, description = load_checkpoint(checkpoint)
    assert (description.task, description.classes, description.metrics["calibration_images"]) == ("features", None, 6)
    assert description.metrics["verdict"]["good"] and description.metrics["verdict"]["images"] == 1
    exporting = ("export", "--checkpoint", checkpoint, "--onnx", tmp_path / "a.onnx")
    assert invoke(*exporting, "--sizes", "44x36,36x44", "--json", tmp_path / "a.json") == 0
    first = json.loads((tmp_path / "a.json").read_text())
    assert [first["onnx"], *(other["onnx"] for other in first["others"])] == [
        str(tmp_path / f"a-{size}.onnx") for size in ("44x36", "36x44")
    ]
    assert (first["strides"], first["task"]) == ({"stage1": 2, "stage2": 4}, "features")
    images = torch.randn(2, 3, 36, 44)
    session = Session("graph", (tmp_path / "a-36x44.onnx").read_bytes())
    with torch.no_grad():
        maps = model(images)
    for ours, theirs in zip(session.run(list(maps), images.numpy()), maps.values(), strict=True):
        assert np.abs(ours - theirs.numpy()).mean() < 0.01 * theirs.std().item()
    comparing = ("compare", "--model", checkpoint, "--reference", tmp_path / "a-44x36.onnx", "--images", 2)
    assert invoke(*comparing, "--json", tmp_path / "c.json") == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["mean_abs"] < 0.02 and "top1_agreement" not in found
    capsys.readouterr()
    line = fails(capsys, "evaluate", "--model", checkpoint, "--data", tmp_path / "data" / "train")
    assert "a backbone has no accuracy of its own" in line


def test_a_backbone_is_not_trained_by_the_command(config, capsys):
    assert "a backbone is trained in its detector" in fails(capsys, "train", "--config", config)


@pytest.mark.parametrize("sizes", ["44", "44x", "44x36;36x44", "x", ""])
def test_sizes_that_cannot_be_read_are_one_line(config, tmp_path, capsys, sizes):
    command = ("export", "--config", config, "--checkpoint", tmp_path / "weights.pth", "--onnx", tmp_path / "a.onnx")
    assert "give HEIGHTxWIDTH" in fails(capsys, *command, f"--sizes={sizes}")


def calibrated(name: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    twin = quantize(build_model(name, **{**SETTINGS, **settings}), named_recipe("attention"))
    find_ranges(twin, [torch.randn(4, 3, 32, 32), torch.randn(2, 3, 44, 36)])
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("any_size", [False, True])
def test_tensorrt_rtx_builds_a_graph_of_one_size(tmp_path, any_size):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    settings = SETTINGS if any_size else {**SETTINGS, "padding": "torchvision"}
    twin = calibrated(V1, **settings)
    description = Description({"name": V1, **settings}, "ptq", Preprocessing(size=(72, 96)), recipe=twin.recipe)
    graph, path = export_onnx(twin, description, any_size=any_size), tmp_path / "a.onnx"
    save_onnx(path, graph, {**description.to_dict(), "precision": "int8", "opset": 20})
    options = BuildOptions(precision="int8", target="tensorrt-rtx", batch_sizes=(1, 2, 4))
    if any_size:
        with pytest.raises(ValueError, match="takes images of any size, an engine those of one"):
            build_engine(path, options)
    else:
        assert len(build_engine(path, options)[0]) > 10_000


@pytest.mark.slow
def test_its_gradients_are_those_of_a_compiled_one():
    twin, images = calibrated(V1, padding="torchvision").train(), torch.randn(2, 3, 44, 36)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (twin, compiled):
        sum(each.square().mean() for each in model(images).values()).backward()
        gradients.append([parameter.grad.clone() for parameter in twin.parameters()])
        twin.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize(
    ("padding", "size"), [("timm", (44, 36)), ("torchvision", (45, 37)), ("mmdetection", (45, 37))]
)
def test_the_kernels_compute_what_it_does_at_a_rectangle(name, padding, size):
    lower = pytest.importorskip("qswin.qat.lowering.lower", reason="Triton is not installed").lower
    twin, images = calibrated(name, padding=padding), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, found = twin(images), lower(twin, images[:1])(images)
    assert list(found) == STAGES
    for ours, theirs in zip(found.values(), expected.values(), strict=True):
        assert (ours - theirs).abs().mean() < 0.01 * theirs.std()
