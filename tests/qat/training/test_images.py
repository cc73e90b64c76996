"""Training images that cannot be read."""

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from qswin.calib.data.folders import ImageFolder
from qswin.qat.schema import DataConfig
from qswin.qat.training.data import TrainingData
from qswin.qat.training.images import TrainImages, load_in_order


def images_of(folder: Path, bad: int, good: int, skip: bool) -> TrainImages:
    for index in range(good):
        Image.new("RGB", (4, 4)).save(folder / f"{index}.png")
    files = [*(folder / f"missing{index}.png" for index in range(bad)), *sorted(folder.glob("*.png"))]
    samples = ImageFolder(folder, ("a",), tuple((file, 0) for file in files))
    return TrainImages(samples, lambda image, label: (image.size, label), seed=0, epoch=0, skip_unreadable=skip)


def test_any_number_of_unreadable_images_is_skipped(tmp_path):
    images = images_of(tmp_path, bad=1500, good=2, skip=True)
    assert images[0] == ((4, 4), 0, 1500) and images[1501] == ((4, 4), 0, 1501)


def test_an_unreadable_image_is_opened_once(tmp_path, monkeypatch):
    """Not once for each image that looks for the next readable one: a whole class that is unreadable takes no hour."""
    images, opened = images_of(tmp_path, bad=50, good=1, skip=True), []
    read = images.read
    monkeypatch.setattr(images, "read", lambda path: opened.append(path) or read(path))
    assert [images[index][2] for index in range(51)] == [50] * 51
    assert len(opened) == 50 + 51


def test_images_none_of_which_can_be_read_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: none of its 3 images can be read"):
        images_of(tmp_path, bad=3, good=0, skip=True)[1]
    with pytest.raises(ValueError, match=r"missing0\.png: missing, or cannot be read"):
        images_of(tmp_path, bad=3, good=1, skip=False)[0]


def test_more_processes_than_cores_are_told_of_in_one_line(tmp_path, monkeypatch, caplog):
    """torch's own warning of it is two long ones."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    images = images_of(tmp_path, bad=0, good=2, skip=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(load_in_order(images, [[0], [1]], 2, len)) == [1, 1]
    TrainingData(None, None, DataConfig(workers=2), 1, 0, None)
    assert "data.workers=2, and this machine has 1 cores" in caplog.text
