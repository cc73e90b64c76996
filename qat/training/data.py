"""The data of a training run: its folders, its decoder, and the batches of each rank."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qswin.calib.data.batches import Batch, image_batches
from qswin.calib.data.folders import ImageFolder, scan_folder
from qswin.calib.data.images import Preprocessing
from qswin.calib.data.shards import ImageFile
from qswin.qat.distributed import Ranks
from qswin.qat.schema import AugmentConfig, DataConfig
from qswin.qat.training import dali
from qswin.qat.training.images import TrainBatch, TrainImages, Transform, epoch_batches, load_batches, train_transform


class Folders(NamedTuple):
    train: ImageFolder
    validation: ImageFolder


def scan_folders(task: str, root: Path) -> Folders:
    """train/ and val/ of a root, of the same classes. Raises as `scan_folder` does."""
    train = scan_folder(task, root / "train")
    return Folders(train, scan_folder(task, root / "val", train.classes))


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
    task: str, preprocessing: Preprocessing, data: DataConfig, augment: AugmentConfig, device: torch.device
) -> Decoder:
    """The decoder that `data.decoder` names. Raises ValueError for an augmentation that it lacks."""
    if data.decoder == "dali":
        load = functools.partial(dali.load_batches, preprocessing=preprocessing, workers=data.workers, device=device)
        return Decoder(dali.EncodedImages, dali.DrawPiece(augment), load)
    transform = train_transform(task, preprocessing, augment)
    return Decoder(TrainImages, transform, functools.partial(load_batches, workers=data.workers))


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

    def files(self, indices: Sequence[int]) -> str:
        """The names of training images, in one line."""
        return ", ".join(str(self.folders.train.samples[index][0]) for index in indices)
