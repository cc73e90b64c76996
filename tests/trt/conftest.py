"""Exported graphs of a small Swin, made once: float, FP16 and INT8 at opsets 17 and 20.

QSWIN_GRAPHS names a folder of such graphs, exported earlier, for a machine whose TensorRT is in a Python without torch:

    python -m tests.trt.conftest DIR
    QSWIN_GRAPHS=DIR python -m pytest -o addopts= --confcutdir tests/trt tests/trt/test_gpu.py
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

KINDS = {
    "fp32": ("fp32", 20, None),
    "fp16": ("fp16", 20, None),
    "int8": ("int8", 20, None),
    "fp32-17": ("fp32", 17, None),
    "int8-17": ("int8", 17, None),
    "int8-batch2": ("int8", 20, 2),
    "fp32-scaled": ("fp32", 20, None),  # of a model with channel scales
    "int8-scaled": ("int8", 20, None),
    "int8-scaled-17": ("int8", 17, None),
    "fp8": ("fp8", 20, None),
    "uint8": ("int8", 20, None),  # the probabilities of attention alone
}
EVERYWHERE = {"sites": "*", "quantize": True}
RECIPES = {
    "int8": {"name": "all", "rules": [EVERYWHERE]},
    "fp8": {"name": "all in FP8", "format": "fp8", "rules": [EVERYWHERE]},
    "uint8": {"name": "unsigned", "rules": [EVERYWHERE, {"sites": "attn.probs", "activation_format": "uint8"}]},
}


class Graphs(dict[str, Path]):
    """{kind: path}, each exported when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__({path.stem: path for path in folder.glob("*.onnx")})
        self.folder, self._twins = folder, {}

    def __missing__(self, kind: str) -> Path:
        from qswin.qat.export.onnx_export import export_onnx, save_onnx

        path = self[kind] = self.folder / f"{kind}.onnx"
        if path.is_file():  # another worker's
            return path
        precision, opset, batch = KINDS[kind]
        twin, description = self._calibrated("scaled" in kind, kind if kind in RECIPES else "int8")
        metadata = {**description.to_dict(), "precision": precision}
        save_onnx(path, export_onnx(twin, description, precision, opset, batch), metadata)
        return path

    def _calibrated(self, scaled, recipe):
        if (scaled, recipe) not in self._twins:
            import torch

            from qswin.qat.ptq.ranges import find_ranges
            from qswin.qat.quant.recipe import Recipe
            from qswin.qat.quant.rewrite import quantize
            from tests.helpers import DESCRIPTION, scale_channels, small_swin

            rules = Recipe.from_dict(RECIPES[recipe])
            twin = quantize(small_swin(depths=[2, 1]), rules)
            images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
            find_ranges(twin, [images])
            if scaled:
                scale_channels(twin, images, "fc2", "head.fc")
            self._twins[scaled, recipe] = twin, dataclasses.replace(DESCRIPTION, recipe=rules)
        return self._twins[scaled, recipe]


@pytest.fixture(scope="session")
def graphs(tmp_path_factory) -> Graphs:
    """In a folder that the workers of pytest-xdist share: an export takes ten seconds."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        (shared := tmp_path_factory.getbasetemp().parent / "graphs").mkdir(exist_ok=True)
    else:
        shared = tmp_path_factory.mktemp("graphs")
    return Graphs(Path(os.environ.get("QSWIN_GRAPHS") or shared))


if __name__ == "__main__":
    exported = Graphs(Path(sys.argv[1]))
    print(*(exported[kind] for kind in KINDS), sep="\n")
