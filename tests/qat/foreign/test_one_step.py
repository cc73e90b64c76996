"""`qswin quantize`: from a checkpoint and a folder of images to INT8, in one go."""

import json
import shutil

import pytest
import torch

from qswin.qat.checkpoint import read_description
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import fails, invoke
from tests.models.checkpoints.test_logits import torchvision_swin

SMALL = ("recipe=gemm", "device=cpu", "data.workers=0", "calibration.batch_size=4", "calibration.equalize=false")


@pytest.fixture
def flat(data, tmp_path):
    """The images of the training folder, without the folders of their classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, path in enumerate(sorted((data / "train").rglob("*.png"))):
        shutil.copy(path, folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_from_weights_and_a_flat_folder_to_int8(swin_file, flat, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("quantize", "--model", swin_file, "--data", flat, "-o", out, *SMALL, "--json", tmp_path / "q.json")
    assert invoke(*arguments) == 0
    said = capsys.readouterr().out
    assert "mine.pth: swin_tiny_patch4_window7_224 of torchvision, 5 classes" in said
    assert "the same class for" in said and "report.html" in said
    result = json.loads((tmp_path / "q.json").read_text())
    assert (result["kind"], result["library"], result["run"]) == ("quantization", "torchvision", str(out))
    assert result["comparison"]["top1_agreement"] > 50 and result["comparison"]["images"] == len(list(flat.iterdir()))
    assert OnnxRuntimePredictor(out / "int8.onnx").precision == "int8"
    assert read_description(out / "ptq.safetensors").classes is None
    page = (out / "report.html").read_text()
    assert "Verdicts" in page and "Comparisons" in page
    checkpoint = (out / "ptq.safetensors").read_bytes()
    assert invoke(*arguments) == 0 and (out / "ptq.safetensors").read_bytes() == checkpoint


@pytest.mark.slow
def test_class_folders_name_the_classes(swin_file, data, tmp_path):
    out = tmp_path / "run"
    assert invoke("quantize", "--model", swin_file, "--data", data, "-o", out, *SMALL) == 0
    names = tuple(sorted(path.name for path in (data / "train").iterdir()))
    assert read_description(out / "ptq.safetensors").classes == names


def test_what_cannot_be_quantized_is_one_line_and_leaves_nothing(swin_file, flat, tmp_path, capsys):
    out = tmp_path / "run"
    assert "no such checkpoint" in fails(capsys, "quantize", "--model", tmp_path / "x.pth", "--data", flat, "-o", out)
    state = torchvision_swin(False).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "body.pth")
    assert "without a head" in fails(capsys, "quantize", "--model", tmp_path / "body.pth", "--data", flat, "-o", out)
    assert not out.exists()
