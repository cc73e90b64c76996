"""Folders of labelled images: a folder for each class, or, for segmentation, a mask for each image. No torch."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qswin.calib.data.coco import ANNOTATIONS, read_coco
from qswin.calib.data.images import EXTENSIONS
from qswin.calib.data.shards import ImageFile, scan_shard
from qswin.calib.reading import read_regular

LARGEST_NAMES = 64 << 20  # bytes of classes.txt
Sample = tuple[ImageFile, int | Path]  # an image's file, and its class index or the file of its mask


class ImageFolder(NamedTuple):
    """Labelled images. A class's index is its place among `classes`."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]  # sorted by class and name; those of shards in the order of the shards


def scan_folder(task: str, root: str | Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """Lists the labelled images of a folder.

    Classification: one folder of images per class, as in ImageNet; the classes are the sorted names of the folders. Or
    WebDataset shards, `*.tar` (qswin.calib.data.shards); the classes are the lines of `classes.txt` in `root` or beside
    it, and numbers where there is no such file.
    Segmentation: `images/NAME.*` and `masks/NAME.png`, whose pixel values are class indices; the classes are the lines
    of `classes.txt` beside `root`, the background first.
    Features: the images that `annotations.json`, in COCO's format (qswin.calib.data.coco), names; or all images in the
    folder and in those below it. There are no classes.

    Args:
        task: "classification", "segmentation" or "features".
        classes: the class names the model was trained with, in order; None accepts any.

    Raises:
        FileNotFoundError: a folder or file of the layout is missing.
        ValueError: there are no images, an image lacks its mask, or the classes differ from `classes`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the one that holds {LAYOUTS[task]}")
    return SCANNERS[task](root, None if classes is None else tuple(classes))


def scan_unlabelled(task: str, root: str | Path) -> ImageFolder:
    """As `scan_folder`, for what needs no labels: images that lie in no class's folder will do. They have no classes.

    Raises:
        FileNotFoundError, ValueError: as `scan_folder` does.
    """
    return scan_folder(task if _is_laid_out(Path(root)) else "features", root)


def _is_laid_out(root: Path) -> bool:
    return root.is_dir() and (any(entry.is_dir() for entry in root.iterdir()) or any(root.glob("*.tar")))


def scan_with_labels_if_any(
    task: str, root: str | Path, classes: Sequence[str] | None
) -> tuple[ImageFolder, str | None]:
    """As `scan_folder`; where the labels are none of this model, as `scan_unlabelled`, and why.

    Raises:
        FileNotFoundError, ValueError: there are no images either way.
    """
    if not _is_laid_out(Path(root)):
        return scan_unlabelled(task, root), f"the images of {root} lie in no folder of a class"
    try:
        return scan_folder(task, root, classes), None
    except ValueError as error:
        return scan_unlabelled(task, root), str(error)


def training_folder(root: str | Path) -> Path:
    """`root`/train; or `root` itself, where it is a folder with neither train nor val."""
    root = Path(root)
    alone = root.is_dir() and not any((root / name).exists() for name in ("train", "val"))
    return root if alone else root / "train"


def _scan_classes(root: Path, classes: tuple[str, ...] | None) -> ImageFolder:
    if shards := sorted(root.glob("*.tar")):
        return _scan_shards(root, shards, classes)
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if classes is not None:
        _check_classes(root, found, classes)
    samples = tuple((path, index) for index, name in enumerate(found) for path in _images(root / name))
    if not samples:
        raise ValueError(f"{root}: no images in its {len(found)} class folders; the layout is {root}/CLASS/IMAGE.jpg")
    return ImageFolder(root, found, samples)


def _scan_shards(root: Path, shards: list[Path], classes: tuple[str, ...] | None) -> ImageFolder:
    samples = tuple(sample for shard in shards for sample in scan_shard(shard))
    if not samples:
        raise ValueError(f"{root}: no images in its {len(shards)} shards; a sample is NAME.jpg and NAME.cls")
    largest = max(label for _, label in samples)
    names = next((file for folder in (root, root.parent) if (file := folder / "classes.txt").is_file()), None)
    found = tuple(str(label) for label in range(largest + 1)) if names is None else _read_names(names)
    if names is not None and classes is not None:
        _check_classes(root, found, classes)
    elif classes is not None:
        found = classes
    if largest >= len(found):
        raise ValueError(f"{root}: a label is {largest}, but there are {len(found)} classes")
    return ImageFolder(root, found, samples)


def _read_names(file: Path) -> tuple[str, ...]:
    try:
        text = read_regular(file, LARGEST_NAMES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not text in UTF-8; write one class name a line") from error
    return tuple(name for line in text.split("\n") if (name := line.strip()))


def _scan_masks(root: Path, classes: tuple[str, ...] | None) -> ImageFolder:
    names = root.parent / "classes.txt"
    if classes is None and not names.is_file():
        raise FileNotFoundError(f"{names}: no such file; write one class name a line, the background first")
    found = _read_names(names) if names.is_file() else classes or ()
    if classes is not None:
        _check_classes(root, found, classes)
    masks = {path.stem: path for path in _images(root / "masks")}
    images = _images(root / "images")
    if not images:
        raise ValueError(f"{root}: no images in {root / 'images'}; the layout is {LAYOUTS['segmentation']}")
    for image in images:
        if image.stem not in masks:
            raise ValueError(f"{image}: lacks its mask {root / 'masks' / image.stem}.png")
    return ImageFolder(root, found, tuple((image, masks[image.stem]) for image in images))


def _scan_images(root: Path, classes: tuple[str, ...] | None) -> ImageFolder:
    annotations = root / ANNOTATIONS
    named = annotations.is_file()
    files = [root / picture.file_name for picture in read_coco(annotations).images] if named else _images(root)
    if not files:
        raise ValueError(f"{annotations if named else root}: no images")
    return ImageFolder(root, (), tuple((path, 0) for path in files))


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS]


SCANNERS = {"classification": _scan_classes, "segmentation": _scan_masks, "features": _scan_images}
LAYOUTS = {
    "classification": "one folder of images a class, or WebDataset shards (*.tar)",
    "segmentation": "images/NAME.png and masks/NAME.png",
    "features": "images, and perhaps their annotations.json",
}


def check_class_count(root: Path, found: int, classes: int) -> None:
    """Raises ValueError unless a folder has as many classes as the model."""
    if found != classes:
        raise ValueError(f"{root}: {found} classes, but the model has {classes} classes")


def _check_classes(root: Path, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    check_class_count(root, len(found), len(expected))
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            raise ValueError(
                f"{root}: class {index} is {theirs!r} here but {ours!r} in the model; classes are sorted by name"
            )


def spread_samples(folder: ImageFolder, images: int) -> Sequence[Sample]:
    """`images` samples of a folder at even distances; all samples where `images` is 0 or more than there are."""
    count = len(folder.samples)
    if not 0 < images < count:
        return folder.samples
    return [folder.samples[index * count // images] for index in range(images)]


def draw_samples(folder: ImageFolder, images: int, seed: int) -> list[Sample]:
    """`images` samples of a folder, drawn at random without replacement, the same for the same seed.

    Raises:
        ValueError: `images` is less than 1.
    """
    if images < 1:
        raise ValueError("0 images to calibrate on; calibration needs at least 1, and 256 to 1024 do well")
    return random.Random(seed).sample(folder.samples, min(images, len(folder.samples)))
