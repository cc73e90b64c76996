"""WebDataset shards: tar files in which NAME.jpg and NAME.cls are a labelled image.

A scan reads the headers only. Images are then read at their place in the tar file, in any order; nothing is unpacked.
Shuffling, ranks, workers and resuming therefore work as with a folder of images.
"""

import io
import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from qswin.calib.data.images import EXTENSIONS, LARGEST
from qswin.calib.reading import open_regular

LONGEST_LABEL = 20  # bytes of a .cls file
LARGEST_LABEL = 1_000_000  # there is a name for each class up to the largest
NAME = re.compile(r"^((?:.*/)?[^./]+)(\.[^/]*)$")  # as webdataset splits: a sample's name ends at the first dot


class TarImage(NamedTuple):
    """An image in a tar file. It opens as a Path does."""

    shard: Path
    offset: int
    size: int
    name: str

    def open(self, mode: str = "rb") -> io.BytesIO:
        with open_regular(self.shard) as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem


ImageFile = Path | TarImage


def scan_shard(shard: Path) -> list[tuple[TarImage, int]]:
    """The images of a shard with their class indices, in the order of the file.

    Raises:
        ValueError: the file is not a tar file, or is compressed, truncated or malformed; or an image lacks its label,
            or a label its image; or an image is too large.
    """
    images: dict[str, TarImage] = {}
    labels: dict[str, int] = {}
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                split = NAME.match(member.name)
                if not member.isreg() or member.sparse is not None or split is None:
                    continue
                name, extension = split.group(1), split.group(2).lower()
                if extension in EXTENSIONS:
                    _add(images, name, _image(member, shard), shard)
                elif extension == ".cls":
                    _add(labels, name, _label(tar, member, shard), shard)
    except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
        what = f"not a tar file, compressed or truncated ({error})"
        raise ValueError(f"{shard}: {what}; WebDataset shards are plain .tar files") from error
    unpaired = images.keys() ^ labels.keys()
    if unpaired:
        raise ValueError(f"{shard}: {min(unpaired)} lacks its .cls or its image; a sample is NAME.jpg and NAME.cls")
    end = os.path.getsize(shard)
    if any(image.offset + image.size > end for image in images.values()):
        raise ValueError(f"{shard}: truncated; copy it again")
    return [(image, labels[name]) for name, image in images.items()]


def _add(found: dict[str, Any], name: str, value: Any, shard: Path) -> None:
    if name in found:
        raise ValueError(f"{shard}: {name} occurs twice")
    found[name] = value


def _image(member: tarfile.TarInfo, shard: Path) -> TarImage:
    if member.size > LARGEST:
        raise ValueError(f"{shard}: {member.name} is larger than {LARGEST >> 20} MiB; take it out")
    return TarImage(shard, member.offset_data, member.size, member.name)


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member) if member.size <= LONGEST_LABEL else None
    text = b"" if file is None else file.read().strip()
    if not text.isdigit() or int(text) > LARGEST_LABEL:
        raise ValueError(f"{shard}: {member.name} is not a class index")
    return int(text)
