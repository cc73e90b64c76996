"""The detection benchmark on bright squares: a backbone in a detector, through PTQ, ONNX Runtime and QAT."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from benchmarks import detection  # noqa: E402
from qswin.models.registry import build_model  # noqa: E402

SETTINGS = {
    "img_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
}


def slices(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with a square of each of two structures, and their masks."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 64, 64), dtype=np.uint8)
    for mask in masks:
        for label, left in ((1, 4), (3, 36)):
            top, side = rng.integers(4, 30), rng.integers(12, 24)
            mask[top : top + side, left : left + side] = label
    return (60 * masks + rng.integers(0, 40, masks.shape)).astype(np.uint8), masks


def test_boxes_are_around_each_structure():
    mask = torch.zeros(10, 12, dtype=torch.uint8)
    mask[2:5, 3:9] = 2
    mask[7, 0] = 1
    found = detection.boxes_of(mask)
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [[0, 7, 1, 8], [3, 2, 9, 5]]
    assert detection.boxes_of(torch.zeros(4, 4))["boxes"].shape == (0, 4)


def test_slices_are_made_smaller_by_a_whole_factor():
    images, masks = slices(2, 0)
    small, whole = detection.Slices.of(images, masks, 32), detection.Slices.of(images, masks, 64)
    assert small.images[0].shape == (3, 32, 32)
    torch.testing.assert_close(small.images[1].mean(), whole.images[1].mean())
    for ours, theirs in zip(small.targets, whole.targets, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        assert (2 * ours["boxes"] - theirs["boxes"]).abs().max() <= 2


def test_precision_is_whole_for_the_truth_and_none_for_other_boxes(tmp_path):
    part = detection.Slices.of(*slices(3, 0), 64)
    detection.write_annotations(part, tmp_path / "a.json")
    truth = [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.9}
        for each in json.loads((tmp_path / "a.json").read_text())["annotations"]
    ]
    assert detection.average_precision(tmp_path / "a.json", truth) == {"map": 100, "map50": 100}
    moved = [{**each, "bbox": [60, 60, 3, 3]} for each in truth]
    assert detection.average_precision(tmp_path / "a.json", moved)["map50"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_detector_goes_the_whole_way(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(build_model(detection.NAME, 4, **SETTINGS).state_dict(), tmp_path / "unet.pth")
    (train, train_masks), (val, val_masks) = slices(16, 1), slices(4, 2)
    np.savez(tmp_path / "a.npz", train_image=train, train_label=train_masks, val_image=val, val_label=val_masks)
    files = ["--npz", "a.npz", "--checkpoint", "unet.pth", "--work", "work", "--out", "out.json"]
    options = [
        "--recipes",
        "gemm",
        "--epochs",
        "12",
        "--qat-epochs",
        "1",
        "--lr",
        "2e-3",
        "--size",
        "64",
        "--channels",
        "16",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["detection", *files, *options, "--settings", json.dumps(SETTINGS), "--device", "cpu"]
    )
    detection.main()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["stage"], row["backend"]) for row in rows] == [
        ("float", "torch"),
        ("ptq", "torch"),
        ("ptq", "onnxruntime"),
        ("qat", "torch"),
    ]
    assert rows[0]["map50"] > 30
    assert rows[1]["map50"] == pytest.approx(rows[0]["map50"], abs=10)
    assert rows[2]["map"] == pytest.approx(rows[1]["map"], abs=10)
