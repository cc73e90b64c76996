"""NVIDIA DALI's batches against Pillow's, from the same seeds."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.qat.schema import AugmentConfig
from qswin.qat.training.dali import DrawPiece, EncodedImages
from qswin.qat.training.dali import load_batches as load_with_dali
from qswin.qat.training.images import ClassificationTransform, TrainImages, load_batches

PREPROCESSING = Preprocessing(size=(32, 32))
AUGMENT = AugmentConfig(scale=(0.3, 1.0), hflip=0.5, vflip=0.3)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of many sizes and three formats, in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(12):
        height, width = rng.integers(40, 120, 2)
        rough = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        path = root / f"class{index % 2}" / f"{index}.{('jpg', 'png', 'bmp')[index % 3]}"
        path.parent.mkdir(exist_ok=True)
        rough.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
    return scan_folder("classification", root)


def by_dali(folder, batches, workers=0, skip=False, device="cpu"):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'qswin[dali]'")
    dataset = EncodedImages(folder, DrawPiece(AUGMENT), 3, 1, skip)
    return list(load_with_dali(dataset, batches, PREPROCESSING, workers, torch.device(device)))


def by_pillow(folder, batches):
    dataset = TrainImages(folder, ClassificationTransform(PREPROCESSING, AUGMENT), 3, 1, False)
    return list(load_batches(dataset, batches, 0))


def levels(ours, reference):
    """How far pixels are apart, of 255."""
    return (ours.images.cpu() - reference.images).abs() * torch.tensor(PREPROCESSING.std).view(3, 1, 1) * 255


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_dali_sees_what_pillow_sees(folder, device):
    batches = [[3, 0, 5, 4], [1, 2, 9, 11], [10, 8, 7, 6]]
    for ours, reference in zip(by_dali(folder, batches, device=device), by_pillow(folder, batches), strict=True):
        assert ours.indices.tolist() == reference.indices.tolist() and ours.labels.tolist() == reference.labels.tolist()
        apart = levels(ours, reference)
        assert apart.mean() < 1 and apart.max() < 20  # Pillow rounds between its two passes
        other = (ours.images.cpu() - reference.images.flip(-1)).abs() * 255
        assert other.mean() > 5  # another flip is another image


def test_workers_and_the_place_of_a_batch_do_not_change_it(folder):
    batches = [[3, 0, 5, 4], [1, 2, 9, 11]]
    expected = by_dali(folder, batches)[1]
    for found in (by_dali(folder, batches, workers=2)[1], by_dali(folder, batches[1:])[0]):
        assert torch.equal(found.images, expected.images) and torch.equal(found.indices, expected.indices)


def test_what_dali_cannot_read_is_an_error_of_one_line(folder, tmp_path):
    broken = tmp_path / "class0" / "0.jpg"
    broken.parent.mkdir()
    data = folder.samples[0][0].read_bytes()
    for content, message in (
        (b"no image", "0.jpg: missing, or cannot be read"),
        (data[:60], "0.jpg: missing, or cannot be read"),
        (data[:-200], "0.jpg: damaged, and DALI stops at it"),
    ):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            by_dali(scan_folder("classification", tmp_path), [[0]])
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name, mode", [("0.gif", "P"), ("0.tif", "F"), ("0.tif", "LAB")])
def test_what_dali_reads_otherwise_is_refused(tmp_path, name, mode):
    (tmp_path / "class0").mkdir()
    Image.new("RGB", (8, 8)).convert("L" if mode == "F" else "RGB").convert(mode).save(tmp_path / "class0" / name)
    with pytest.raises(ValueError, match=f"does not read .* of mode {mode} as Pillow does; convert it"):
        by_dali(scan_folder("classification", tmp_path), [[0]])


def in_mode(image, mode):
    """Pillow converts to 16 bits by cutting them off."""
    return (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a quarter


@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("0.jpg", "CMYK", {}),
        ("0.jpg", "RGB", {"exif": TURNED}),
        ("0.png", "P", {"transparency": 3}),
        ("0.png", "I;16", {}),
        ("0.webp", "RGBA", {"lossless": True}),
        ("0.tif", "CMYK", {}),
    ],
)
def test_other_modes_are_read_as_pillow_reads_them(folder, tmp_path, name, mode, options):
    (tmp_path / "class0").mkdir()
    in_mode(Image.open(folder.samples[0][0]), mode).save(tmp_path / "class0" / name, **options)
    other = scan_folder("classification", tmp_path)
    (ours,), (reference,) = by_dali(other, [[0]]), by_pillow(other, [[0]])
    assert levels(ours, reference).mean() < 1


def test_an_unreadable_image_gives_its_place_to_the_next(folder, tmp_path):
    (tmp_path / "class0").mkdir()
    (tmp_path / "class0" / "0.jpg").write_bytes(b"no image")
    (tmp_path / "class0" / "1.jpg").write_bytes(folder.samples[0][0].read_bytes())
    (batch,) = by_dali(scan_folder("classification", tmp_path), [[0, 1]], skip=True)
    assert batch.indices.tolist() == [1, 1]


def test_without_dali_its_install_command_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.plugin.pytorch", None)
    with pytest.raises(ValueError, match=r"needs NVIDIA DALI: pip install 'qswin\[dali\]'"):
        by_dali(folder, [[0]])


@pytest.mark.parametrize(
    "name, value", [("color_jitter", 0.4), ("auto_augment", "rand-m9"), ("random_erase", 0.1), ("rotate", 5.0)]
)
def test_augmentations_of_colours_and_angles_are_refused(name, value):
    with pytest.raises(ValueError, match=f"train.augment.{name} is not done by data.decoder=dali"):
        DrawPiece(AugmentConfig(**{name: value}))
