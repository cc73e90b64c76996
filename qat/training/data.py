"""The data of a training run: its folders, its decoder, and the batches of each rank."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import logging

from qswin.calib.data.batches import Batch, decoding_processes, image_batches
from qswin.calib.data.folders import ImageFolder, scan_folder, spread_samples
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.calib.validation import shown
from qswin.qat.distributed import Ranks
from qswin.qat.schema import AugmentConfig, DataConfig
from qswin.qat.training import dali
from qswin.qat.training.images import TrainBatch, TrainImages, Transform, epoch_batches, load_batches, train_transform

SIZED = 1000  # files of a folder whose sizes are compared


class Folders(NamedTuple):
    train: ImageFolder
    validation: ImageFolder


def scan_folders(task: str, root: Path) -> Folders:
    """train/ and val/ of a root, of the same classes. Raises as `scan_folder` does."""
    train = scan_folder(task, root / "train")
    return Folders(train, scan_folder(task, root / "val", train.classes))


def fingerprint(folder: ImageFolder) -> dict[str, Any]:
    """What tells a folder's images from others, wherever the folder is: names, labels, and the sizes of some files."""
    digest = hashlib.sha256()
    for file, label in folder.samples:
        digest.update(f"{_name(file, folder.root)}\0{_name(label, folder.root)}\n".encode(errors="surrogateescape"))
    for file, _ in spread_samples(folder, SIZED):
        digest.update(f"{_size(file)}\n".encode())
    return {"images": len(folder.samples), "classes": len(folder.classes), "listing": digest.hexdigest()}


def _name(file: ImageFile | int, root: Path) -> str:
    return str(file) if isinstance(file, int) else str(file).removeprefix(str(root))


def _size(file: ImageFile) -> int:
    """In bytes; 0 of a file that has gone since the folder was listed."""
    if not isinstance(file, Path):
        return file.size
    return file.stat().st_size if file.is_file() else 0


class Decoder(NamedTuple):
    """How training images are read, what they go through, and how batches of them are loaded."""

    images: type[TrainImages]
    transform: Transform
    load: Callable[[Any, Sequence[list[int]]], Iterator[TrainBatch]]


def check_decoder(decoder: str, task: str) -> None:
    """Raises ValueError for a decoder that cannot read a task's images and labels."""
    if decoder == "dali" and task != "classification":
        raise ValueError("data.decoder=dali is for classification; set data.decoder=pillow")


def choose_decoder(
    task: str, preprocessing: Preprocessing, data: DataConfig, augment: AugmentConfig, device: torch.device, images: int
) -> Decoder:
    """The decoder that `data.decoder` names, for so many images. Raises ValueError where it lacks an augmentation."""
    workers = decoding_processes(data.workers, images)
    if data.decoder == "dali":
        load = functools.partial(dali.load_batches, preprocessing=preprocessing, workers=workers, device=device)
        return Decoder(dali.EncodedImages, dali.DrawPiece(augment), load)
    transform = train_transform(task, preprocessing, augment)
    return Decoder(TrainImages, transform, functools.partial(load_batches, workers=workers))


class TrainingData:
    """One rank's batches of train/, augmented, and of val/.

    Args:
        batch_size: images in a batch of one rank.
        seed: of the order and the augmentation.

    Raises:
        ValueError: the decoder lacks what is asked for.
    """

    def __init__(
        self, folders: Folders, decoder: Decoder, data: DataConfig, batch_size: int, seed: int, ranks: Ranks
    ) -> None:
        if (data.workers or 0) > (cores := os.cpu_count() or 1):
            logging.warning("data.workers=%d, and this machine has %d cores: fewer may be faster", data.workers, cores)
        self.folders, self.decoder, self.options = folders, decoder, data
        self.batch_size, self.seed, self.ranks = batch_size, seed, ranks

    def __len__(self) -> int:
        """Batches of one rank in an epoch."""
        return len(self.folders.train.samples) // (self.batch_size * self.ranks.world)

    def batches(self, epoch: int, start: int, stop: int) -> Iterator[TrainBatch]:
        """The batches from `start` to before `stop` of an epoch."""
        folder, skip = self.folders.train, self.options.skip_unreadable
        rank, world = self.ranks.rank, self.ranks.world
        order = epoch_batches(len(folder.samples), self.batch_size, rank, world, self.seed, epoch)
        images = self.decoder.images(folder, self.decoder.transform, self.seed, epoch, skip)
        return self.decoder.load(images, order[start:stop])

    def validation_batches(self, preprocessing: Preprocessing) -> Iterator[Batch]:
        """This rank's share of val/."""
        samples = self.folders.validation.samples[self.ranks.rank :: self.ranks.world]
        skipped: list[ImageFile] | None = [] if self.options.skip_unreadable else None
        return image_batches(samples, preprocessing, self.batch_size, self.options.workers, skipped)

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """{"train", "val"}: what tells these images from others."""
        return {"train": fingerprint(self.folders.train), "val": fingerprint(self.folders.validation)}

    def check_fingerprints(self, before: Any) -> None:
        """Raises ValueError, saying what changed, unless training began with these images.

        Args:
            before: what last.pt says of them: `fingerprints` then.
        """
        if before == self.fingerprints:
            return
        for split, now in self.fingerprints.items():
            was = before.get(split) if isinstance(before, dict) else None
            if not isinstance(was, dict):
                raise ValueError("it does not say which images it was trained on")
            for what in now:
                if was.get(what) != now[what]:
                    counts = f"{shown(was.get(what))} {what}, now {now[what]}"
                    changed = "other files or labels" if what == "listing" else counts
                    raise ValueError(f"the images in {split}/ have changed since training began ({changed})")

    def files(self, indices: Sequence[int]) -> str:
        """The names of training images, in one line."""
        return ", ".join(str(self.folders.train.samples[index][0]) for index in indices)
