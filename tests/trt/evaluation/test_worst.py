"""Pictures of the images that a classifier gets most wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from qswin.calib.data.batches import Batch
from qswin.calib.data.images import Preprocessing, load_pixels
from qswin.trt.evaluation.worst import WorstImages

CLASSES = ("cat", "dog/wolf", "bird")
PREPROCESSING = Preprocessing(size=(8, 8))


@pytest.fixture
def files(tmp_path):
    """Eight images of noise."""
    rng, files = np.random.default_rng(0), [tmp_path / f"{index}.png" for index in range(8)]
    for path in files:
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(path)
    return files


def test_the_least_likely_are_drawn_whatever_the_batches(files, tmp_path):
    logits, labels = torch.randn(8, 3).numpy(), np.arange(8) % 3
    own = torch.from_numpy(logits).double().softmax(1).numpy()[np.arange(8), labels]
    for batch_size in (8, 3):
        folder = tmp_path / f"by{batch_size}"
        metric = WorstImages(folder, 3, CLASSES, PREPROCESSING)
        for start in range(0, 8, batch_size):
            part = slice(start, start + batch_size)
            metric.update(logits[part], Batch(np.zeros(0), labels[part], files[part]))
        assert metric.result() == {"pictures": str(folder)}
        metric.draw()
        expected = {
            f"{own[i]:.4f}_{CLASSES[labels[i]]}_as_{CLASSES[logits[i].argmax()]}_{i}.png".replace("/", "-"): files[i]
            for i in own.argsort()[:3]
        }
        assert {path.name for path in folder.iterdir()} == set(expected)
        for name, file in expected.items():
            np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), load_pixels(file, PREPROCESSING))


def test_an_answer_of_nan_is_among_the_worst(files, tmp_path):
    logits = np.array([[9.0, 0, 0], [np.nan, 0, 0], [0, 1, 0]], np.float32)
    metric = WorstImages(tmp_path / "worst", 1, CLASSES, PREPROCESSING)
    metric.update(logits, Batch(np.zeros(0), np.array([0, 0, 1]), files[:3]))
    metric.draw()
    assert [path.stem.split("_")[0] for path in (tmp_path / "worst").iterdir()] == ["0.0000"]
