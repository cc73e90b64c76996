"""Images and masks from files, decoded and preprocessed for a model. No torch."""

import contextlib
import dataclasses
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol

import numpy as np
from msgspec import Meta
from PIL import Image

from qswin.calib.reading import open_regular
from qswin.calib.validation import Number, Positive
from qswin.limits import scale

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
Interpolation = Literal["bicubic", "bilinear"]
CropMode = Literal["center", "squash"]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
BROKEN = (  # what Pillow's readers raise over a damaged file
    *(OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(RuntimeError, struct.error, zlib.error),
)
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose pixels Pillow widens from 16 bits to 32
CAPTION = "Description"  # the key of a PNG's text that says what it shows
UNREADABLE = (
    "missing, or cannot be read as an image; mend or remove it, or skip it"
    " (--skip-unreadable, or data.skip_unreadable=true in a config)"
)

LARGEST = 256 << 20  # bytes of an image's file
LARGEST_SIDE = int(4096 * scale())  # pixels, of a model's input
LONGEST = 16  # times its shorter side, of an image that is resized as a whole
SMALLEST_CROP = 0.05  # of the resized image's side: what is cropped away is computed first
Side = Annotated[int, Meta(ge=1, le=LARGEST_SIDE)]


class TooLarge(Exception):
    """A file has more bytes than an image."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resized so that it just covers size / crop_pct, then its centre is cropped.

    `size` is (height, width) in pixels. `mean` and `std` are for each RGB channel, with pixel values in [0, 1]. The
    `crop_mode` "squash" resizes to size / crop_pct, whatever the image's proportions.
    """

    size: tuple[Side, Side] = (224, 224)
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: Annotated[float, Meta(ge=SMALLEST_CROP, le=1)] = 0.9
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"interpolation {self.interpolation!r} is not known; choose one of {', '.join(RESAMPLING)}"
            )
        for field in ("size", "mean", "std"):  # JSON and YAML give lists
            object.__setattr__(self, field, tuple(getattr(self, field)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Source(Protocol):
    """A file or a part of one: a Path, or a qswin.calib.data.shards.TarImage."""

    def open(self, mode: str) -> IO[bytes]: ...


def load_image(path: str | Source, preprocessing: Preprocessing, out: np.ndarray | None = None) -> np.ndarray:
    """Decodes and preprocesses one file to (3, H, W) float32, written to `out` if it is given.

    Raises:
        ValueError: the file is missing or cannot be decoded. The message names it.
    """
    pixels = load_pixels(path, preprocessing)
    out = np.empty((3, *preprocessing.size), dtype=np.float32) if out is None else out
    return _normalize(pixels, preprocessing, out)


def noise_images(count: int, preprocessing: Preprocessing) -> np.ndarray:
    """(count, 3, H, W) float32, standard normal with seed 0: the mean and variance of normalised images."""
    return np.random.default_rng(0).standard_normal((count, 3, *preprocessing.size), dtype=np.float32)


def load_pixels(path: str | Source, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes one file to (H, W, 3) uint8, resized and cropped. Raises ValueError for a file that is unreadable."""
    resampling = RESAMPLING[preprocessing.interpolation]
    return np.asarray(_resize_and_crop(open_image(path, "RGB"), preprocessing, resampling))


def load_mask(path: str | Source, image: Source, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes the mask of an image to (H, W) uint8 class indices, resized and cropped as the image is.

    Raises:
        ValueError: a file cannot be read, the mask is in colour, or its size differs. The message names the file.
    """
    mask = open_image(path)
    if mask.mode not in ("L", "P"):
        raise ValueError(
            f"{path}: a mask has one channel of 8-bit class indices; the mode of this one is {mask.mode!r}"
        )
    with naming_unreadable(image), open_source(image) as file:
        header = Image.open(file)
    check_size(path, mask, header)
    return np.asarray(_resize_and_crop(mask, preprocessing, Image.Resampling.NEAREST))


def check_size(path: str | Source, mask: Image.Image, image: Image.Image) -> None:
    """Raises ValueError, which names the mask's file, unless a mask has the size of its image."""
    if mask.size != image.size:
        raise ValueError(f"{path}: is {mask.size} pixels, its image {image.size}; both must have the same size")


def open_image(path: str | Source, mode: str | None = None) -> Image.Image:
    """Decodes an image, or the first frame of an animation, and converts it to a colour mode if one is given.

    Raises:
        ValueError: the file cannot be read, or its pixels have no known range. The message names the file.
    """
    source = Path(path) if isinstance(path, str) else path
    with naming_unreadable(path), open_source(source) as file, Image.open(file) as image:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
    return image if mode is None else _to_8_bits(image, path).convert(mode)


def open_source(source: Source) -> IO[bytes]:
    """Opens a file or a part of one.

    Raises:
        OSError: it is not a regular file.
        TooLarge: Pillow would look for an image in all of it.
    """
    if not isinstance(source, Path):
        return source.open("rb")
    file = open_regular(source)
    if os.fstat(file.fileno()).st_size > LARGEST:
        file.close()
        raise TooLarge(f"larger than {LARGEST >> 20} MiB; make it smaller or remove it")
    return file


@contextlib.contextmanager
def naming_unreadable(path: str | Source) -> Iterator[None]:
    """Turns whatever Pillow raises for a file that it cannot read into a ValueError that names the file."""
    try:
        yield
    except Image.DecompressionBombError as error:
        limit = f"has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's MAX_IMAGE_PIXELS"
        raise ValueError(f"{path}: {limit}; make it smaller or remove it") from error
    except TooLarge as error:
        raise ValueError(f"{path}: {error}") from error
    except BROKEN as error:
        raise ValueError(f"{path}: {UNREADABLE}") from error


def _to_8_bits(image: Image.Image, path: str | Source) -> Image.Image:
    """Scales 16 bits to 8. Pillow clips them at 255, which turns almost all of such an image white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{path}: its 32-bit pixels have no known range; convert it to 8 or 16 bits")
    return image


def _normalize(pixels: np.ndarray, preprocessing: Preprocessing, out: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32: (pixel / 255 - mean) / std, from a table of a byte's 256 values."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        values = (levels - np.float32(mean)) / np.float32(std)
        np.take(values, pixels[..., channel], out=out[channel], mode="clip")
    return out


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, resampling: Image.Resampling) -> Image.Image:
    """Resizes to floor(size / crop_pct), or to the smallest size that covers it, then crops the centre, as timm does.

    Of an image that is longer than `LONGEST` times its width only the centre is resized, so that memory follows the
    output. Its pixels are almost the same: places within the box are rounded otherwise.
    """
    height, width = preprocessing.size
    target = (math.floor(width / preprocessing.crop_pct), math.floor(height / preprocessing.crop_pct))
    squash = preprocessing.crop_mode == "squash"
    size = target if squash else _covering(image.size, target)
    if max(image.size) > LONGEST * min(image.size) and not squash:
        return _resize_centre(image, size, (width, height), resampling)
    if image.size != size:
        image = image.resize(size, resampling)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size in the same proportions that just covers a target, both (width, height).

    Sides are rounded to the nearest for a rectangle, as in timm's ResizeKeepRatio, and down for a square.
    """
    width, height = size
    if target[0] == target[1]:
        long = int(target[0] * max(size) / min(size))
        return (target[0], long) if width <= height else (long, target[0])
    ratio = min(width / target[0], height / target[1])
    return round(width / ratio), round(height / ratio)


def _resize_centre(
    image: Image.Image, size: tuple[int, int], cropped: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """The centre, `cropped`, of an image resized to `size`, without the rest of it."""
    corner = [round((length - side) / 2) for length, side in zip(size, cropped, strict=True)]
    scale = [whole / length for whole, length in zip(image.size, size, strict=True)]
    left, top = (start * factor for start, factor in zip(corner, scale, strict=True))
    right, bottom = ((start + side) * factor for start, side, factor in zip(corner, cropped, scale, strict=True))
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return image.resize(cropped, resampling, box=box)
