"""Image batches against timm's own evaluation transform."""

import os
import socket

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from qswin.calib.data import images
from qswin.calib.data.folders import scan_folder
from qswin.calib.data.images import Preprocessing, load_image, load_pixels


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("shape", [(64, 64), (300, 217), (217, 300), (33, 70), (1, 1), (224, 224)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_timms(tmp_path, shape, crop_pct, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = create_transform((3, 32, 32), interpolation=interpolation, crop_pct=crop_pct)(image).numpy()
    preprocessing = Preprocessing(size=(32, 32), interpolation=interpolation, crop_pct=crop_pct)
    np.testing.assert_allclose(load_image(tmp_path / "a.png", preprocessing), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (300, 217), (217, 300), (33, 70), (1, 1), (40, 56)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(40, 56), (56, 40)])
def test_preprocessing_to_a_rectangle_is_timms(tmp_path, shape, crop_mode, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = create_transform((3, *size), interpolation="bicubic", crop_pct=0.9, crop_mode=crop_mode)(image).numpy()
    preprocessing = Preprocessing(size=size, interpolation="bicubic", crop_pct=0.9, crop_mode=crop_mode)
    np.testing.assert_allclose(load_image(tmp_path / "a.png", preprocessing), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("P", (10, 20, 30), (10, 20, 30)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, colour, rgb):
    Image.new(mode, (8, 8), colour).save(file := tmp_path / "a.tiff")
    pixels = load_pixels(file, Preprocessing(size=(8, 8)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(rgb, (8, 8, 3)))


def test_classes_are_the_sorted_folders(data):
    folder = scan_folder("classification", data / "val")
    assert folder.classes == ("class0", "class1", "class2", "class3", "class4")
    assert len(folder.samples) == 20


def test_folders_that_cannot_be_used_say_why(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        scan_folder("classification", tmp_path / "nowhere")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        scan_folder("classification", tmp_path / "empty")
    with pytest.raises(ValueError, match="5 classes, but the model has 3"):
        scan_folder("classification", data / "val", ["a", "b", "c"])
    with pytest.raises(ValueError, match="class 4 is 'class4' here but 'zebra'"):
        scan_folder("classification", data / "val", ["class0", "class1", "class2", "class3", "zebra"])


def test_settings_that_cannot_be_used_say_why():
    with pytest.raises(ValueError, match="interpolation"):
        Preprocessing(interpolation="nearest-ish")


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bits_become_8(tmp_path, suffix):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(deep).save(file := tmp_path / f"a.{suffix}")
    pixels = load_pixels(file, Preprocessing(size=(8, 8), crop_pct=1.0))
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_allclose(pixels[..., 0] * 257.0, deep, atol=128.5)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.zeros((8, 8), dtype)).save(file := tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff: its 32-bit pixels have no known range"):
        load_image(file, Preprocessing(size=(8, 8)))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_socket, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_images(tmp_path, make):
    """A FIFO waits for its writer, a device may never end."""
    make(file := tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: missing, or cannot be read as an image"):
        load_image(file, Preprocessing(size=(8, 8)))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation_is_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file := tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(load_pixels(file, Preprocessing(size=(8, 8)))[0, 0], [255, 0, 0])


def test_a_photograph_of_64_megabytes_is_read(tmp_path):
    """Noise hardly compresses: 6000 x 5000 pixels at quality 100 and no chroma subsampling."""
    noise = np.random.default_rng(0).integers(0, 256, (5000, 6000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := tmp_path / "a.jpg", quality=100, subsampling=0)
    assert file.stat().st_size > 64e6
    pixels = load_pixels(file, Preprocessing(size=(8, 8)))
    np.testing.assert_allclose(pixels, 127.5, atol=3)  # the mean of the noise


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    Image.new("RGB", (32, 32)).save(file := tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: has more than 16 pixels"):
        load_image(file, Preprocessing(size=(8, 8)))


@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (3, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_long_image_is_cropped_before_it_is_resized(tmp_path, monkeypatch, shape, interpolation):
    """The pixels are almost those of the whole image resized: both passes of the filter round."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    preprocessing = Preprocessing(size=(32, 32), interpolation=interpolation)
    monkeypatch.setattr(images, "LONGEST", 1000)
    whole = load_pixels(tmp_path / "a.png", preprocessing).astype(int)
    monkeypatch.setattr(images, "LONGEST", 4)
    centre = load_pixels(tmp_path / "a.png", preprocessing).astype(int)
    assert np.abs(centre - whole).max() <= 16 and np.abs(centre - whole).mean() < 1.5


def test_the_memory_of_a_long_image_follows_the_output(tmp_path, monkeypatch):
    Image.new("L", (1, 10**6), 77).save(tmp_path / "a.png")
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k)
    )
    pixels = load_pixels(tmp_path / "a.png", Preprocessing())
    assert sizes == [(224, 224)] and pixels.shape == (224, 224, 3) and (pixels == 77).all()


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("L", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="a.png: has more than 2000 pixels"),
    ):
        load_pixels(tmp_path / "a.png", Preprocessing())


def test_a_file_of_1_tb_is_not_an_image(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"a\.jpg: larger than 256 MiB; make it smaller or remove it"):
        load_pixels(tmp_path / "a.jpg", Preprocessing())
