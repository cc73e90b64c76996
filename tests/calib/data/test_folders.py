"""Folders as they are laid out, what is said of those that are not, and what is taken of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qswin.calib.data.batches import image_batches
from qswin.calib.data.folders import (
    ImageFolder,
    scan_folder,
    scan_unlabelled,
    scan_with_labels_if_any,
    spread_samples,
    training_folder,
)
from qswin.calib.data.images import Preprocessing, load_mask, open_image
from qswin.qat.schema import AugmentConfig
from qswin.qat.training.images import train_transform
from tests.helpers import write_masks


@pytest.fixture
def masks(tmp_path) -> Path:
    return write_masks(tmp_path / "data")


def test_images_come_with_their_masks(masks):
    folder = scan_folder("segmentation", masks / "val")
    assert folder.classes == ("background", "left", "right") and len(folder.samples) == 6
    (batch,) = image_batches(folder.samples, Preprocessing(size=(16, 16), crop_pct=1.0), 8)
    assert batch.images.shape == (6, 3, 16, 16) and batch.labels.shape == (6, 16, 16) and batch.labels.dtype == np.uint8
    assert [file.name for file in batch.files] == [image.name for image, _ in folder.samples]
    for mask, (_, file) in zip(batch.labels, folder.samples, strict=True):
        np.testing.assert_array_equal(mask, np.asarray(Image.open(file)))


def test_a_mask_is_cut_as_its_image_is_and_keeps_its_values(tmp_path):
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 5, (10, 14)), np.ones((4, 4))).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        load_mask(tmp_path / "a.png", tmp_path / "a.png", Preprocessing(size=(10, 10), crop_pct=1.0)),
        mask[1::4, 9:49:4],
    )


def test_folders_that_cannot_be_used_say_why(masks):
    with pytest.raises(ValueError, match="class 1 is 'left' here but 'top' in the model"):
        scan_folder("segmentation", masks / "val", ["background", "top", "right"])
    with pytest.raises(ValueError, match="3 classes, but the model has 2"):
        scan_folder("segmentation", masks / "val", ["background", "left"])
    (masks / "val" / "masks" / "case1_slice_1.png").unlink()
    with pytest.raises(ValueError, match=r"case1_slice_1\.png: lacks its mask"):
        scan_folder("segmentation", masks / "val")
    (masks / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt.*one class name a line"):
        scan_folder("segmentation", masks / "val")
    with pytest.raises(FileNotFoundError, match=r"images/NAME\.png and masks/NAME\.png"):
        scan_folder("segmentation", masks / "test")
    (masks / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        scan_folder("segmentation", masks / "empty", ["a", "b"])


def test_images_without_labels_may_lie_flat(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (4, 4)).save(photos / "a.png")
    found = scan_unlabelled("classification", photos)
    assert (found.classes, [path.name for path, _ in found.samples]) == ((), ["a.png"])
    assert training_folder(photos) == photos
    (photos / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "cat" / "b.png")
    assert scan_unlabelled("classification", photos).classes == ("cat",)
    (photos / "train").mkdir()
    assert training_folder(photos) == photos / "train"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        scan_unlabelled("classification", training_folder(tmp_path / "nowhere"))


def test_labels_are_left_where_they_are_none_of_the_models(masks, tmp_path):
    (photos := tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(photos / "a.png")
    assert scan_with_labels_if_any("classification", photos.parent, ["cat"])[1] is None
    folder, why = scan_with_labels_if_any("classification", photos.parent, ["cat", "dog"])
    assert "1 classes, but the model has 2" in why and len(folder.samples) == 1
    folder, why = scan_with_labels_if_any("segmentation", masks / "val" / "images", ["background", "left", "right"])
    assert "lie in no folder of a class" in why and len(folder.samples) == 6
    (masks / "val" / "masks" / "case1_slice_1.png").unlink()
    with pytest.raises(ValueError, match="lacks its mask"):
        scan_with_labels_if_any("segmentation", masks / "val", None)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        scan_with_labels_if_any("classification", tmp_path / "nowhere", None)


def test_class_names_are_text_of_a_bounded_size(masks):
    (names := masks / "classes.txt").write_bytes(b"background\n\xff\n")
    with pytest.raises(ValueError, match=r"classes\.txt: not text in UTF-8; write one class name a line"):
        scan_folder("segmentation", masks / "val")
    with names.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"classes\.txt: larger than 64 MiB"):
        scan_folder("segmentation", masks / "val")


def test_a_mask_in_colour_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="8-bit class indices.*'RGB'"):
        load_mask(tmp_path / "a.png", tmp_path / "a.png", Preprocessing(size=(8, 8)))


def test_a_mask_of_another_size_than_its_image_is_refused(masks):
    """Both would be cut to the model's size, and the pixels would not be the image's."""
    folder = scan_folder("segmentation", masks / "val")
    image, mask = folder.samples[0]
    Image.open(mask).resize((9, 7)).save(mask)
    message = r"case0_slice_0\.png: is \(9, 7\) pixels, its image .*; both must have the same size"
    with pytest.raises(ValueError, match=message):
        list(image_batches(folder.samples, Preprocessing(size=(8, 8)), 2))
    with pytest.raises(ValueError, match=message):
        train_transform("segmentation", Preprocessing(size=(8, 8)), AugmentConfig())(open_image(image, "RGB"), mask)


@given(st.integers(1, 60), st.integers(0, 70))
def test_spread_samples_lie_at_even_distances(count, images):
    folder = ImageFolder(Path("a"), ("a",), tuple((Path(f"{i}.png"), i) for i in range(count)))
    chosen = [label for _, label in spread_samples(folder, images)]
    assert len(chosen) == (min(images, count) or count) and chosen[0] == 0
    distances = set(np.diff(chosen).tolist())
    assert distances <= {count // len(chosen), -(-count // len(chosen))}
