"""Objects in images, as COCO's files describe them (https://cocodataset.org/#format-data). No torch."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qswin.calib.reading import read_regular
from qswin.calib.validation import Number, shown
from qswin.limits import scale

ANNOTATIONS = "annotations.json"  # in a folder of images
LARGEST_FILE = int(scale() * (1 << 30))  # bytes; that of COCO's training images has 450 MB
OUTSIDE = 1.0  # pixels that a box may reach out of its image: published ones are rounded
Id = Annotated[int, Meta(ge=0, le=1 << 53)]
Length = Annotated[int, Meta(ge=1, le=1 << 20)]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image; `file_name` is below the folder of the file that describes it."""

    id: Id
    file_name: str
    width: Length
    height: Length


@dataclasses.dataclass(frozen=True)
class Annotation:
    """An object. `bbox` is (left, top, width, height) in pixels; `segmentation` is polygons or run lengths."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]
    segmentation: Any = None
    area: Number | None = None
    iscrowd: Literal[0, 1] = 0


@dataclasses.dataclass(frozen=True)
class Category:
    """What an object can be."""

    id: Id
    name: str


@dataclasses.dataclass(frozen=True)
class Coco:
    """The content of a file that `read_coco` has checked."""

    images: tuple[Picture, ...]
    annotations: tuple[Annotation, ...] = ()
    categories: tuple[Category, ...] = ()

    def objects(self) -> dict[int, list[Annotation]]:
        """{image: its annotations}, of each image."""
        found: dict[int, list[Annotation]] = {picture.id: [] for picture in self.images}
        for annotation in self.annotations:
            found[annotation.image_id].append(annotation)
        return found


def read_coco(file: Path) -> Coco:
    """The images, objects and categories of a file. Keys that are not read may be there.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not such a file; or an object is of no image or category of it, or its box is empty or not
            inside its image; or an image is missing or outside of the file's folder. The first is named.
    """
    try:
        coco = msgspec.json.decode(read_regular(file, LARGEST_FILE), type=Coco)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not annotations in COCO's format: {error}") from error
    _check_images(file, coco)
    _check_objects(file, coco)
    return coco


def _check_images(file: Path, coco: Coco) -> None:
    if len({picture.id for picture in coco.images}) < len(coco.images):
        raise ValueError(f"{file}: two images have the same id")
    folder = file.parent.resolve()
    for picture in coco.images:
        path = file.parent / picture.file_name
        if not path.resolve().is_relative_to(folder):
            raise ValueError(f"{file}: image {picture.id}: {shown(picture.file_name)} is not below {file.parent}")
        if not path.is_file():
            raise ValueError(f"{file}: image {picture.id}: there is no {path}; copy it there, or leave it out")


def _check_objects(file: Path, coco: Coco) -> None:
    pictures = {picture.id: picture for picture in coco.images}
    categories = {category.id for category in coco.categories}
    for annotation in coco.annotations:
        where, picture = f"{file}: annotation {annotation.id}", pictures.get(annotation.image_id)
        if picture is None:
            raise ValueError(f"{where}: image_id {annotation.image_id} is not among the images")
        if annotation.category_id not in categories:
            raise ValueError(f"{where}: category_id {annotation.category_id} is not among the categories")
        left, top, width, height = annotation.bbox
        if not (width > 0 and height > 0):
            raise ValueError(f"{where}: its box {annotation.bbox} is empty; width and height must be above 0")
        right, bottom = left + width, top + height
        if min(left, top) < -OUTSIDE or right > picture.width + OUTSIDE or bottom > picture.height + OUTSIDE:
            size = f"{picture.width} x {picture.height}"
            raise ValueError(f"{where}: its box {annotation.bbox} is not inside its image of {size} pixels")
