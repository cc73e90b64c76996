"""What every hostile case starts from: a small calibrated model, its graphs, images and a config."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from qswin import (
    Description,
    Preprocessing,
    build_model,
    calibrate,
    export_onnx,
    named_recipe,
    quantize,
    save_checkpoint,
    save_onnx,
)

NAME = "swin_tiny_patch4_window7_224"
SETTINGS = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
CLASSES = ("a", "b")


class World:
    """The files of one case's folder, and the commands that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.weights = folder / "ptq.safetensors", folder / "weights.pth"
        self.images, self.onnx, self.run = folder / "images", folder / "fp32.onnx", folder / "run"
        self.config, self.out = folder / "config.yaml", folder / "out.json"

    def first(self, command: list[Any]) -> None:
        """Runs a command of qswin's to its end, before the one that is tried."""
        done = subprocess.run([sys.executable, "-m", "qswin", *map(str, command)], cwd=self.folder, capture_output=True)
        if done.returncode:
            raise SystemExit(done.stderr.decode(errors="replace"))

    def last(self, **changes: Any) -> None:
        """A training that has ended, its last.pt changed: each change makes a value of the one before."""
        self.first(self.train())
        state = torch.load(self.run / "last.pt", weights_only=True)
        state |= {name: change(state[name]) for name, change in changes.items()}
        torch.save(state, self.run / "last.pt")

    def sidecar(self, **changes: Any) -> Path:
        """The checkpoint, its sidecar's keys replaced."""
        file = self.checkpoint.with_name("ptq.safetensors.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return self.checkpoint

    def model(self, **changes: Any) -> Path:
        """The checkpoint, with more settings of its architecture."""
        return self.sidecar(model={"name": NAME, "num_classes": len(CLASSES), **SETTINGS, **changes})

    def state(self, **changes: Any) -> Path:
        """The weights, some tensors replaced or added."""
        torch.save({**torch.load(self.weights, weights_only=True), **changes}, self.weights)
        return self.weights

    def calibrate(self, *settings: str) -> list[Any]:
        return ["calibrate", "--config", self.config, *settings]

    def train(self, *settings: str) -> list[Any]:
        return ["train", "--config", self.config, f"init={self.checkpoint}", *settings]

    def evaluate(self, *more: Any) -> list[Any]:
        return ["evaluate", "--model", self.checkpoint, "--data", self.images / "val", "--workers", 0, *more]

    def evaluate_graph(self, *more: Any) -> list[Any]:
        return ["evaluate", "--model", self.onnx, "--data", self.images / "val", "--workers", 0, *more]


def make_world(folder: Path) -> None:
    """Writes the files into a folder."""
    world = World(folder)
    torch.manual_seed(0)
    _write_images(world.images)
    model = build_model(NAME, num_classes=len(CLASSES), **SETTINGS)
    torch.save(model.state_dict(), world.weights)
    twin = quantize(model, named_recipe("gemm"))
    calibrate(twin, [torch.randn(4, 3, 32, 32)])
    settings = {"name": NAME, "num_classes": len(CLASSES), **SETTINGS}
    description = Description(settings, "ptq", Preprocessing(size=(32, 32)), CLASSES, twin.recipe)
    save_checkpoint(world.checkpoint, twin, description)
    for precision in ("fp32", "int8"):
        save_onnx(folder / f"{precision}.onnx", export_onnx(twin, description, precision), description.to_dict())
    config = {
        "model": {"name": NAME, "num_classes": len(CLASSES), "checkpoint": "weights.pth", "kwargs": SETTINGS},
        "data": {"root": "images", "workers": 0},
        "calibration": {"images": 4, "batch_size": 2},
        "train": {"batch_size": 2, "epochs": 1},
        "recipe": "gemm",
        "run": "run",
        "device": "cpu",
    }
    world.config.write_text(yaml.safe_dump(config))


def _write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (folder := root / split / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
