"""Exported graphs of a small Swin, made once: float, FP16 and INT8 at opsets 17 and 20."""

from pathlib import Path

import pytest
import torch

from calib.images import Preprocessing
from qat.checkpoint import Description
from qat.export import export_onnx, save_onnx
from qat.ptq import calibrate
from qat.recipe import named_recipe
from qat.rewrite import quantize
from tests.conftest import SMALL, V1, small_swin

CLASSES = tuple(f"class{i}" for i in range(5))
DESCRIPTION = Description({"name": V1, "num_classes": 5, **SMALL}, "ptq", Preprocessing(size=(32, 32)), CLASSES)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory) -> dict[str, Path]:
    """{"fp32", "fp16", "int8", "fp32-17", "int8-17", "int8-batch2": path}."""
    folder = tmp_path_factory.mktemp("graphs")
    twin = quantize(small_swin(), named_recipe("full"))
    calibrate(twin, [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))])
    kinds = {
        "fp32": ("fp32", 20, None),
        "fp16": ("fp16", 20, None),
        "int8": ("int8", 20, None),
        "fp32-17": ("fp32", 17, None),
        "int8-17": ("int8", 17, None),
        "int8-batch2": ("int8", 20, 2),
    }
    description = Description(**{**vars(DESCRIPTION), "recipe": named_recipe("full")})
    paths = {}
    for name, (precision, opset, batch) in kinds.items():
        paths[name] = folder / f"{name}.onnx"
        metadata = {**description.to_dict(), "precision": precision}
        save_onnx(paths[name], export_onnx(twin, description, precision, opset, batch), metadata)
    return paths
