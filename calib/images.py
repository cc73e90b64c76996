"""ImageFolder batches as NumPy arrays, without torch: what calibration and evaluation read."""

import dataclasses
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
UNREADABLE = "missing, or cannot be read as an image; mend or remove it, or set data.skip_unreadable=true"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a file becomes a model's input: the shorter side is resized to size / crop_pct, the centre is cut out.

    `size` is (height, width) in pixels; `mean` and `std` are per RGB channel, of values in [0, 1].
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation {self.interpolation!r} is not known; choose one of {', '.join(RESAMPLING)}")
        for field in ("size", "mean", "std"):  # JSON and YAML give lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.size[0] != self.size[1]:
            raise ValueError(f"input size {self.size} is not square; only square inputs are supported")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class ImageFolder(NamedTuple):
    """Images in one folder a class, as ImageNet is laid out; a class's index is its place among the sorted names."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[tuple[Path, int], ...]  # (file, class index), sorted by class and name


_Decoding = tuple[list[tuple[Path, int]], np.ndarray, list["Future[np.ndarray]"]]


class Batch(NamedTuple):
    images: np.ndarray  # (N, 3, H, W) float32, normalised
    labels: np.ndarray  # (N,) int64


def scan_image_folder(root: str | Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """Lists the images below `root`, a folder of class folders.

    Args:
        classes: the class names the model was trained with, in order; None accepts any.

    Raises:
        FileNotFoundError: `root` is not there.
        ValueError: it holds no class folders or no images, or other classes than `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds one folder of images a class")
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if classes is not None:
        _check_classes(root, found, tuple(classes))
    samples = tuple(
        (path, index)
        for index, name in enumerate(found)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    )
    if not samples:
        raise ValueError(f"{root}: no images in its {len(found)} class folders; the layout is {root}/CLASS/IMAGE.jpg")
    return ImageFolder(root, found, samples)


def check_class_count(root: Path, folders: int, classes: int) -> None:
    """Raises ValueError unless there are as many class folders as the model has classes."""
    if folders != classes:
        raise ValueError(f"{root}: {folders} class folders, but the model has {classes} classes")


def _check_classes(root: Path, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    check_class_count(root, len(found), len(expected))
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            raise ValueError(
                f"{root}: class {index} is {theirs!r} here but {ours!r} in the model; the order is by folder name"
            )


def draw_samples(folder: ImageFolder, images: int, seed: int) -> list[tuple[Path, int]]:
    """`images` of a folder's samples, drawn without replacement; the same for the same seed. Raises ValueError for 0."""
    if images < 1:
        raise ValueError("0 images to calibrate on; calibration needs at least 1, and 256 to 1024 do well")
    return random.Random(seed).sample(folder.samples, min(images, len(folder.samples)))


def load_image(path: str | Path, preprocessing: Preprocessing, out: np.ndarray | None = None) -> np.ndarray:
    """Decodes and preprocesses one file to (3, H, W) float32, written to `out` if it is given.

    Raises:
        ValueError: the file is missing or cannot be decoded; it is named.
    """
    try:
        with Image.open(path) as image:
            pixels = _resize_and_crop(image.convert("RGB"), preprocessing)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path}: {UNREADABLE}") from error
    out = np.empty((3, *preprocessing.size), dtype=np.float32) if out is None else out
    return _normalize(np.asarray(pixels), preprocessing, out)


def _normalize(pixels: np.ndarray, preprocessing: Preprocessing, out: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32: (pixel / 255 - mean) / std, looked up, for a byte has 256 values only."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        values = (levels - np.float32(mean)) / np.float32(std)
        np.take(values, pixels[..., channel], out=out[channel], mode="clip")
    return out


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resizes the shorter side to floor(size / crop_pct), then cuts out the centre, as timm and torchvision do."""
    side = preprocessing.size[0]
    short = math.floor(side / preprocessing.crop_pct)
    long = int(short * max(image.size) / min(image.size))
    size = (short, long) if image.width <= image.height else (long, short)
    if image.size != size:
        image = image.resize(size, RESAMPLING[preprocessing.interpolation])
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def fill_up(images: np.ndarray, size: int) -> np.ndarray:
    """A batch of at least `size` images: the last one is repeated; a model's answers to those are to be cut off."""
    missing = size - len(images)
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing > 0 else images


def image_batches(
    samples: Sequence[tuple[Path, int]],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 4,
    skipped: list[Path] | None = None,
) -> Iterator[Batch]:
    """Yields batches in the order of `samples`, decoded by threads that stay two batches ahead.

    Args:
        skipped: unreadable files are left out and added to this list; without a list they are an error.

    Raises:
        ValueError: a file cannot be read and there is no list `skipped`.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        files = iter(samples)
        chunks = iter(lambda: list(itertools.islice(files, batch_size)), [])
        pending: deque[_Decoding] = deque()
        try:
            for chunk in chunks:
                images = np.empty((len(chunk), 3, *preprocessing.size), dtype=np.float32)
                decoding = [
                    pool.submit(load_image, path, preprocessing, out) for (path, _), out in zip(chunk, images, strict=True)
                ]
                pending.append((chunk, images, decoding))
                if len(pending) > 2:
                    yield from _collect(*pending.popleft(), skipped)
            while pending:
                yield from _collect(*pending.popleft(), skipped)
        finally:
            for future in itertools.chain.from_iterable(decoding for _, _, decoding in pending):
                future.cancel()


def _collect(
    chunk: list[tuple[Path, int]], images: np.ndarray, decoding: list[Future[np.ndarray]], skipped: list[Path] | None
) -> Iterator[Batch]:
    """Yields the batch once its files are decoded; nothing when all of them were skipped."""
    kept = []
    for index, future in enumerate(decoding):
        if skipped is not None and isinstance(future.exception(), ValueError):
            skipped.append(chunk[index][0])
            continue
        future.result()
        kept.append(index)
    labels = np.asarray([label for _, label in chunk], dtype=np.int64)
    if len(kept) == len(chunk):
        yield Batch(images, labels)
    elif kept:
        yield Batch(images[kept], labels[kept])
