"""A run's folder with small model files: a graph that runs, and others of which only the sidecar is real."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from qswin.calib.data.images import Preprocessing
from qswin.calib.files import write_with_sidecar

HOW = Preprocessing(size=(24, 24), crop_pct=0.9)
LABELS = ["cat", "dog", "große Straße"]
KINDS = {".engine": "engine", ".plan": "engine", ".pt2": "package", ".qsb": "bundle"}
BUILT = {
    ".engine": {
        "target": "tensorrt",
        "version": "8.6.1",
        "gpu": "NVIDIA L4",
        "capability": "8.9",
        "profile": [1, 8, 16],
    },
    ".pt2": {"target": "inductor", "version": "2.14.0", "gpu": "NVIDIA L4", "capability": "8.9", "profile": [1, 8, 64]},
    ".qsb": {"target": "bundle", "version": "3.8.0", "architectures": [80, 90], "batch_sizes": [1, 4]},
}


def description(**changes):
    model = {"name": "swin_tiny_patch4_window7_224", "num_classes": len(LABELS)}
    values = {"task": "classification", "classes": LABELS, "model": model, "preprocessing": HOW.to_dict()}
    return values | {"precision": "int8"} | changes


def save_graph(path: Path, batch: int | str = "batch", **changes) -> Path:
    """A classifier by mean colour: logits are weights times the mean of each channel."""
    known = description(**changes)
    shape = [batch, 3, *known["preprocessing"]["size"]]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(LABELS)])]
    weights = np.float32([[1, -2, 0.5], [0.3, 1, 1], [-1, 0.2, 2]])
    constants = [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.int64([2, 3]), "axes")]
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"qswin": json.dumps(known)})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def save_built(path: Path, **changes) -> Path:
    """Some bytes and the sidecar that `qswin build` writes."""
    known = {"engine_precision": "int8", **BUILT[".engine" if path.suffix == ".plan" else path.suffix]}
    write_with_sidecar(path, path.suffix.encode(), KINDS[path.suffix], description() | known | changes)
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a file of each kind, and results."""
    run = tmp_path / "run"
    save_graph(run / "int8.onnx")
    for suffix in BUILT:
        save_built(run / f"int8{suffix}")
    return run


def save_photos(folder: Path) -> list[Path]:
    """Photos of many shapes and modes; what preprocessing does differs for each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    sizes = {"wide": (97, 41), "tall": (31, 83), "square": (24, 24), "tiny": (5, 7), "long": (900, 11)}
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    grey = rng.integers(0, 256, (40, 50), np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 65536, (40, 50), np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 256, (40, 50, 4), np.uint8)).save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 256, (60, 50, 3), np.uint8)).save(folder / "photo.jpg")
    return [*paths, *(folder / name for name in ("grey.png", "deep.png", "alpha.png", "photo.jpg"))]
