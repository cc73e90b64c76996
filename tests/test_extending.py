"""The examples of docs/extending.md: what is added from outside the repository works as what is built in."""

import importlib.util
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import qswin
from qswin.calib import grid
from qswin.calib.calibrators import CALIBRATORS, find_range
from qswin.calib.grid import grid_of
from qswin.calib.reading import read_json
from qswin.qat.backends import registry
from qswin.qat.quant.quantizers import quantizers
from tests.helpers import SMALL, V1, filled, invoke, small_swin

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """What the examples register is forgotten afterwards."""
    registries = (CALIBRATORS, grid._GRIDS, registry._known())
    before = [dict(each) for each in registries]
    yield
    for each, old in zip(registries, before, strict=True):
        each.clear()
        each.update(old)


def example(name: str):
    """A file of docs/examples, imported: importing it registers what it defines."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "docs" / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_page_shows_the_example_as_it_is_tested(file):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert file.read_text() in blocks


@pytest.fixture(scope="module")
def fp4():
    example("format")
    return grid_of("fp4")


def test_the_format_rounds_as_ml_dtypes_does(fp4):
    x = np.concatenate([np.linspace(-9, 9, 721), [0.25, -0.75, 1.25, 1.75, 2.5, 3.5, 5.0]]).astype(np.float32)
    expected = x.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(fp4.nearest(x), expected)
    np.testing.assert_array_equal(fp4.nearest(torch.from_numpy(x)).numpy(), expected)


def test_the_format_is_calibrated_trained_and_saved(fp4, images, tmp_path):
    recipe = qswin.Recipe("mine", (qswin.Rule("fc1", quantize=True),), weight_format="fp4", weight_calibrator="mse")
    model = small_swin()
    twin = qswin.quantize(model, recipe)
    qswin.calibrate(twin, [images])
    weights = [q for q in quantizers(twin) if q.site.endswith(".weight")]
    assert weights and all(q.spec.grid.name == "fp4" for q in weights)
    twin(images).sum().backward()
    fc1 = twin.layers[0].blocks[0].mlp.fc1
    assert fc1.weight.grad.abs().sum() > 0
    levels = (weights[0](fc1.weight) / weights[0].scale).detach()
    assert set(levels.abs().flatten().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    description = qswin.Description(
        {"name": V1, "num_classes": 5, **SMALL}, "ptq", qswin.Preprocessing(size=(32, 32)), recipe=recipe
    )
    qswin.save_checkpoint(tmp_path / "fp4.safetensors", twin, description)
    loaded, _ = qswin.load_checkpoint(tmp_path / "fp4.safetensors")
    torch.testing.assert_close(loaded(images), twin.eval()(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="fp4"):
        qswin.export_onnx(twin, description)


def test_the_calibrator_clips_at_the_root_mean_square():
    example("calibrator")
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * 3
    rms = float(np.sqrt((values.astype(np.float64) ** 2).mean()))
    assert find_range(filled(values), "sigma:2") == pytest.approx(2 * rms, rel=1e-3)
    assert find_range(filled(values), "sigma:100") == pytest.approx(float(np.abs(values).max()))
    with pytest.raises(ValueError, match="sigmas must be above 0 and at most 100"):
        find_range(filled(values), "sigma:0")


@pytest.mark.slow
def test_the_backend_runs_in_every_command(data, tmp_path, capsys):
    backend = example("backend")
    description = qswin.Description(
        {"name": V1, "num_classes": 5, **SMALL},
        "float",
        qswin.Preprocessing(size=(32, 32)),
        tuple(f"class{i}" for i in range(5)),
    )
    model = small_swin().eval()
    backend.save_program(tmp_path / "a.ep", model, description)
    qswin.save_checkpoint(tmp_path / "a.safetensors", model, description)
    scores = []
    for name in ("a.ep", "a.safetensors"):
        arguments = ("--model", tmp_path / name, "--data", data / "val", "--json", tmp_path / f"{name}.r.json")
        assert invoke("evaluate", *arguments) == 0
        scores.append(read_json(tmp_path / f"{name}.r.json"))
    assert scores[0]["acc1"] == scores[1]["acc1"] and scores[0]["images"] == 20
    assert invoke("bench", "--model", tmp_path / "a.ep", "--batch-sizes", "1,2", "--cpu-repeats", 2) == 0
    assert invoke("doctor") == 0
    assert "programs of torch.export (.ep)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=".ep belongs to backend torch.export"):
        registry.register(type("Other", (backend.ExportedProgram,), {"name": "other"})())
