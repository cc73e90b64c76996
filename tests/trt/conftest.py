"""Exported graphs of a small Swin, made once: float, FP16 and INT8 at opsets 17 and 20."""

import dataclasses
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
SETTINGS = {**SMALL, "depths": [2, 1]}
DESCRIPTION = Description({"name": V1, "num_classes": 5, **SETTINGS}, "ptq", Preprocessing(size=(32, 32)), CLASSES)
KINDS = {
    "fp32": ("fp32", 20, None),
    "fp16": ("fp16", 20, None),
    "int8": ("int8", 20, None),
    "fp32-17": ("fp32", 17, None),
    "int8-17": ("int8", 17, None),
    "int8-batch2": ("int8", 20, 2),
}


class Graphs(dict[str, Path]):
    """{kind: path}, each exported when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.recipe = folder, named_recipe("full")
        self.twin = quantize(small_swin(depths=[2, 1]), self.recipe)
        calibrate(self.twin, [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))])

    def __missing__(self, kind: str) -> Path:
        precision, opset, batch = KINDS[kind]
        description = dataclasses.replace(DESCRIPTION, recipe=self.recipe)
        path = self[kind] = self.folder / f"{kind}.onnx"
        metadata = {**description.to_dict(), "precision": precision}
        save_onnx(path, export_onnx(self.twin, description, precision, opset, batch), metadata)
        return path


@pytest.fixture(scope="session")
def graphs(tmp_path_factory) -> Graphs:
    return Graphs(tmp_path_factory.mktemp("graphs"))
