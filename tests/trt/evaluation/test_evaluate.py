"""Accuracy counted against brute force; evaluation of ONNX files from the command line, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qswin.calib.data.batches import Batch, image_batches
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.session import Session
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.trt.evaluation.evaluate import Accuracy, count_correct, evaluate, table
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import SMALL, V1, fails, small_swin

ROOT = Path(__file__).resolve().parents[3]
CLASSES = tuple(f"class{i}" for i in range(5))
DESCRIPTION = Description({"name": V1, "num_classes": 5, **SMALL}, "float", Preprocessing(size=(32, 32)), CLASSES)


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=50)
def test_counts_are_torchs_topk(images, classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.arange(images * classes, dtype=np.float32)).reshape(images, classes)
    labels = rng.integers(0, classes, images)
    top = torch.from_numpy(logits).topk(min(5, classes)).indices.numpy()
    expected = (top[:, 0] == labels).sum(), (top == labels[:, None]).any(axis=1).sum()
    assert count_correct(logits, labels) == expected


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=50)
def test_of_equal_logits_the_first_class_is_the_higher(images, classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (images, classes)).astype(np.float32)  # as of an INT8 output: most are equal to others
    labels = rng.integers(0, classes, images)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = (logits.argmax(axis=1) == labels).sum(), (order[:, :5] == labels[:, None]).any(axis=1).sum()
    assert count_correct(logits, labels) == expected


def test_a_model_that_says_nothing_is_right_by_chance():
    assert count_correct(np.zeros((200, 200)), np.arange(200)) == (1, 5)


def test_nan_is_never_right():
    assert count_correct(np.full((3, 10), np.nan), np.zeros(3, dtype=int)) == (0, 0)


def test_a_label_the_model_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="label 7.*3 classes"):
        count_correct(np.zeros((1, 3)), np.array([7]))


def test_evaluation_weighs_images_not_batches():
    batches = [Batch(np.zeros((n, 3, 1, 1), np.float32), np.full(n, label), []) for n, label in ((9, 0), (1, 1))]
    result = evaluate(
        lambda images: np.tile(np.float32([9, 0, 1, 2, 3, 4, 5]), (len(images), 1)), batches, [Accuracy()]
    )
    assert (result["acc1"], result["acc5"], result["images"]) == (90.0, 90.0, 10)
    right = np.array([1] * 9 + [0])
    assert result["acc1_error"] == pytest.approx(100 * right.std() / np.sqrt(10))


def test_the_table_has_the_standard_error_beside_acc1():
    report = {"model": "a.onnx", "backend": "b", "precision": "int8", "images": 10, "images_per_second": 1.0}
    text = table({**report, "acc1": 90.0, "acc5": 100.0, "acc1_error": 9.487}, Accuracy.headline)
    heading, row = text.splitlines()
    assert "90.00 +-9.49  100.00" in row and len(heading) == len(row)
    assert heading.index("Acc@1") + 5 == row.index("+-9.49") + 6


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="0 images"):
        evaluate(lambda images: images, [], [])


@pytest.fixture(scope="module")
def onnx(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "a.onnx"
    save_onnx(file, export_onnx(small_swin(), DESCRIPTION, "fp32"), DESCRIPTION.to_dict())
    return file


def test_the_command_agrees_with_torch_and_never_imports_it(onnx, data, tmp_path):
    arguments = ["evaluate", "--model", str(onnx), "--data", str(data / "val"), "--json", str(tmp_path / "r.json")]
    subprocess.run([sys.executable, "-m", "tests.without_torch", *arguments], cwd=ROOT, check=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["kind"] == "evaluation"
    folder = scan_folder("classification", data / "val")
    model = small_swin()
    with torch.no_grad():
        batches = list(image_batches(folder.samples, DESCRIPTION.preprocessing, 7))
        right = sum(count_correct(model(torch.from_numpy(b.images)).numpy(), b.labels)[0] for b in batches)
    assert result["acc1"] == pytest.approx(100 * right / 20) and result["images"] == 20
    assert result["backend"].startswith("onnxruntime ") and result["precision"] == "as exported"


def test_a_fixed_batch_is_filled_up(tmp_path):
    graph = export_onnx(small_swin(depths=[1], num_heads=[2]), DESCRIPTION, "fp32", batch=4)
    save_onnx(tmp_path / "a.onnx", graph, DESCRIPTION.to_dict())
    predictor = OnnxRuntimePredictor(tmp_path / "a.onnx")
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    assert predictor.batch_size == 4
    np.testing.assert_allclose(predictor(images[:3]), predictor(images)[:3], atol=1e-6)


@pytest.mark.slow
def test_quantized_graphs_of_a_fixed_batch_run_on_integers(tmp_path, images, monkeypatch):
    """ONNX Runtime left alone makes float products of them."""

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    def float_products() -> int:
        return sum(node.op_type == "Gemm" for node in read_onnx(tmp_path / "optimized.onnx").graph.node)

    twin = quantize(small_swin(depths=[1], num_heads=[2]), named_recipe("gemm"))
    find_ranges(twin, [images])
    for name, batch in (("free", None), ("fixed", len(images))):
        save_onnx(tmp_path / f"{name}.onnx", export_onnx(twin, DESCRIPTION, batch=batch), DESCRIPTION.to_dict())
    free = OnnxRuntimePredictor(tmp_path / "free.onnx")(images.numpy())
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    Session("fixed.onnx", (tmp_path / "fixed.onnx").read_bytes())
    assert float_products() > 0
    fixed = OnnxRuntimePredictor(tmp_path / "fixed.onnx")
    assert float_products() == 0
    np.testing.assert_array_equal(fixed(images.numpy()), free)


def test_files_that_are_no_models_say_so(tmp_path, onnx):
    with pytest.raises(FileNotFoundError, match="no such ONNX file"):
        OnnxRuntimePredictor(tmp_path / "b.onnx")
    (tmp_path / "c.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"c\.onnx: not an ONNX file"):
        OnnxRuntimePredictor(tmp_path / "c.onnx")
    (tmp_path / "d.onnx").write_bytes(onnx.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"d\.onnx"):
        OnnxRuntimePredictor(tmp_path / "d.onnx")


def test_pictures_that_cannot_be_written_cost_nothing_else(onnx, data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--model", onnx, "--data", data / "val", "--workers", "0", "--json", tmp_path / "r.json"]
    line = fails(capsys, "evaluate", *arguments, "--pictures", tmp_path / "file")
    assert "not saved (Not a directory)" in line
    assert json.loads((tmp_path / "r.json").read_text())["images"] > 0
