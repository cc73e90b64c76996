"""TensorRT-RTX takes every graph that is exported, on a CPU."""

import pytest

from calib.images import Preprocessing
from qat.checkpoint import Description
from qat.export import export_onnx, save_onnx
from qat.ptq import calibrate
from qat.recipe import named_recipe
from qat.rewrite import quantize
from tests.conftest import SMALL, V1, V2, small_swin
from trt.build import build_engine

RECIPE = named_recipe("full")
DESCRIPTION = Description({"name": V1, "num_classes": 5, **SMALL}, "ptq", Preprocessing(size=(32, 32)), recipe=RECIPE)


@pytest.mark.parametrize(
    ("name", "precision", "opset", "batch"),
    [(V1, "int8", 20, None), (V1, "int8", 17, None), (V1, "fp16", 20, None), (V2, "int8", 20, 2)],
)
def test_exported_graphs_build(tmp_path, images, name, precision, opset, batch):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    twin = quantize(small_swin(name), RECIPE)
    calibrate(twin, [images])
    save_onnx(tmp_path / "a.onnx", export_onnx(twin, DESCRIPTION, precision, opset, batch), DESCRIPTION.to_dict())
    assert len(build_engine(tmp_path / "a.onnx")) > 100_000


def test_what_cannot_be_built_says_why(tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot parse"):
        build_engine(tmp_path / "a.onnx")
