"""Dice and HD95 against brute force; the command over mask folders; pictures of the worst slices."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qswin.calib.data.batches import Batch
from qswin.calib.data.images import Preprocessing
from qswin.models.registry import build_model
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.trt.evaluation.segmentation import Dice, Overlays, Volumes, split_name
from tests.helpers import UNET, write_masks

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ("background", "left", "right")
NAME = "swin_unet_tiny_patch4_window7_224"


def logits_of(masks: np.ndarray, classes: int = 3) -> np.ndarray:
    """Logits whose highest is where a mask says. (N, H, W) -> (N, classes, H, W)."""
    return np.moveaxis(np.eye(classes, dtype=np.float32)[masks], -1, 1)


def batch_of(masks: np.ndarray, names: list[str] | None = None) -> Batch:
    files = [Path(f"{name}.png") for name in names or [f"slice{i}" for i in range(len(masks))]]
    return Batch(np.zeros((len(masks), 3, *masks.shape[1:]), np.float32), masks.astype(np.uint8), files)


@given(st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=30)
def test_dice_is_counted_by_hand(images, seed):
    """Over pixels of several batches, those of 255 left out."""
    rng = np.random.default_rng(seed)
    true, predicted = rng.integers(0, 3, (2, images, 5, 6))
    true[rng.random(true.shape) < 0.1] = 255
    metric = Dice(CLASSES)
    for index in range(images):
        metric.update(logits_of(predicted[index : index + 1]), batch_of(true[index : index + 1]))
    pairs = [(a, b) for a, b in zip(true.flat, predicted.flat, strict=True) if a != 255]
    expected = {}
    for index, name in ((1, "left"), (2, "right")):
        total = sum(int(a == index) + int(b == index) for a, b in pairs)
        if total:
            expected[name] = 2 * sum(a == b == index for a, b in pairs) / total
    assert metric.result()["dice_per_class"] == pytest.approx(expected)
    assert metric.result()["dice"] == pytest.approx(np.mean(list(expected.values())) if expected else 1.0)


def test_nan_is_no_class():
    metric = Dice(CLASSES)
    metric.update(np.full((1, 3, 2, 2), np.nan, np.float32), batch_of(np.ones((1, 2, 2), int)))
    assert metric.result()["dice"] == 0


def test_a_class_the_model_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="class 7.*3 classes"):
        Dice(CLASSES).update(logits_of(np.zeros((1, 2, 2), int)), batch_of(np.full((1, 2, 2), 7)))


def brute_hd95(ours: np.ndarray, true: np.ndarray) -> float:
    """The 95th percentile of all distances from a surface voxel of one to the nearest of the other, both ways."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(mask.ndim):
            for shift in (-1, 1):
                inner &= np.roll(padded, shift, axis)[tuple(slice(1, -1) for _ in mask.shape)]
        return np.argwhere(mask & ~inner)

    a, b = surface(ours), surface(true)
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return float(np.percentile(np.concatenate([distances.min(1), distances.min(0)]), 95))


def test_volumes_are_put_together_and_measured():
    """Slices come in any order and batch; a volume that lacks a class has no distance for it, but a Dice of 0."""
    rng = np.random.default_rng(0)
    true = np.zeros((2, 4, 12, 12), dtype=int)
    true[0, 1:, 2:8, 3:9], true[0, 2:, 8:11, 3:6], true[1, :3, 4:9, 4:9] = 1, 2, 1
    predicted = np.where(rng.random(true.shape) < 0.1, rng.integers(0, 3, true.shape), true)
    names = [f"case{volume}_slice_{index}" for volume in range(2) for index in range(4)]
    order = rng.permutation(8)
    metric = Volumes(CLASSES)
    for part in (order[:3], order[3:]):
        masks, ours = true.reshape(8, 12, 12)[part], predicted.reshape(8, 12, 12)[part]
        metric.update(logits_of(ours), batch_of(masks, [names[i] for i in part]))
    result = metric.result()
    left = [brute_hd95(predicted[volume] == 1, true[volume] == 1) for volume in range(2)]
    right = brute_hd95(predicted[0] == 2, true[0] == 2)
    assert result["volumes"] == 2
    assert result["volume_hd95_per_class"] == pytest.approx({"left": np.mean(left), "right": right})
    assert result["volume_hd95"] == pytest.approx((np.mean(left) + right) / 2)
    scores = []
    for index in (1, 2):
        for ours, mask in zip(predicted == index, true == index, strict=True):
            scores.append(2 * (ours & mask).sum() / (ours.sum() + mask.sum()))
    assert result["volume_dice"] == pytest.approx(np.mean(scores)) and scores[3] == 0


def test_without_any_class_there_is_no_distance():
    metric = Volumes(CLASSES)
    metric.update(logits_of(np.zeros((1, 4, 4), int)), batch_of(np.zeros((1, 4, 4), int)))
    assert metric.result()["volume_hd95"] is None


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("patient005_frame01_slice_7", ("patient005_frame01", 7)),
        ("case0008-slice012", ("case0008", 12)),
        ("photo", ("photo", 0)),
        ("slice_3", ("", 3)),
    ],
)
def test_slices_name_their_volume(stem, expected):
    assert split_name(stem) == expected


def test_the_worst_slices_are_painted(tmp_path):
    true = np.zeros((4, 8, 8), dtype=int)
    true[:, 2:6, 2:6] = 1
    predicted = true.copy()
    predicted[1, 2:6, 2:4] = 0  # half right
    predicted[3] = 0  # all wrong
    files = []
    for index in range(4):
        files.append(tmp_path / f"s{index}.png")
        Image.new("L", (8, 8), 100).save(files[-1])
    metric = Overlays(tmp_path / "out", 2, CLASSES, Preprocessing(size=(8, 8), crop_pct=1.0))
    for index in range(4):
        part = slice(index, index + 1)
        metric.update(logits_of(predicted[part]), batch_of(true[part])._replace(files=files[part]))
    metric.draw()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.0000_s3.png", "0.6667_s1.png"]
    picture = np.asarray(Image.open(tmp_path / "out" / "0.0000_s3.png"))
    assert picture.shape == (8, 24, 3)
    painted = (picture != 100).any(axis=-1)
    np.testing.assert_array_equal(painted, np.concatenate([true[3] * 0, true[3], predicted[3]], axis=1) > 0)


@pytest.mark.slow
def test_the_command_evaluates_masks_without_torch(tmp_path):
    data = write_masks(tmp_path / "data", side=32)
    preprocessing = Preprocessing(size=(32, 32), crop_pct=1.0)
    description = Description({"name": NAME, "num_classes": 3, **UNET}, "float", preprocessing, CLASSES)
    save_onnx(
        tmp_path / "a.onnx", export_onnx(build_model(NAME, 3, **UNET), description, "fp32"), description.to_dict()
    )
    paths = ["--model", str(tmp_path / "a.onnx"), "--data", str(data / "val"), "--json", str(tmp_path / "r.json")]
    options = ["--pictures", str(tmp_path / "worst"), "--worst", "2"]
    command = [sys.executable, "-m", "tests.without_torch", "evaluate", *paths, *options]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert 0 <= result["dice"] < 1 and result["volumes"] == 2 and result["images"] == 6
    assert "Dice of left" in printed and "HD95" in printed
    assert len(list((tmp_path / "worst").iterdir())) == 2
