"""Training batches: timm's augmentation, in an order and with random numbers that depend on nothing but the seed.

Every random number is drawn from a generator seeded by (seed, epoch, image) or (seed, step, rank), so there is no state to
save: a run that is killed at any step resumes with the same batches, whatever the number of worker processes.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from absl import logging
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calib.images import UNREADABLE, ImageFolder, Preprocessing
from qat.config import AugmentConfig


class TrainBatch(NamedTuple):
    images: Tensor  # (N, 3, H, W) float32, normalised
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64, of the folder's samples


def seed_everything(*key: int) -> None:
    """Seeds Python, NumPy and torch from a tuple of integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state % 2**32))
    torch.manual_seed(int(state % 2**63))


def train_transform(preprocessing: Preprocessing, augment: AugmentConfig) -> Any:
    """timm's training transform: random resized crop, flip, colour, RandAugment, erasing, as the config says."""
    return create_transform(
        (3, *preprocessing.size),
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erase,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


class TrainImages(Dataset[tuple[Tensor, int, int]]):
    """One epoch's images, augmented: (image, label, index). An unreadable one, if skipped, gives its place to the next."""

    def __init__(self, folder: ImageFolder, transform: Any, seed: int, epoch: int, skip_unreadable: bool) -> None:
        self.folder, self.transform = folder, transform
        self.seed, self.epoch, self.skip_unreadable = seed, epoch, skip_unreadable

    def __len__(self) -> int:
        return len(self.folder.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        path, label = self.folder.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if not self.skip_unreadable:
                raise ValueError(f"{path}: {UNREADABLE}") from error
            logging.warning("%s: unreadable, skipped", path)
            return self[(index + 1) % len(self)]
        seed_everything(self.seed, 1, self.epoch, index)
        return self.transform(pixels), label, index


def epoch_batches(images: int, batch_size: int, rank: int, world: int, seed: int, epoch: int) -> list[list[int]]:
    """This rank's batches of one epoch: a permutation of all images, dealt out to the ranks, without a short last batch."""
    order = np.random.default_rng((seed, 2, epoch)).permutation(images)
    steps = images // (batch_size * world)
    dealt = order[: steps * batch_size * world].reshape(steps, world, batch_size)
    return dealt[:, rank].tolist()


def load_batches(dataset: TrainImages, batches: Sequence[list[int]], workers: int) -> Iterator[TrainBatch]:
    """Yields the given batches, in order. Raises ValueError, in one line, for an image that cannot be read."""
    loader = DataLoader(
        dataset,
        batch_sampler=list(batches),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
    except ValueError as error:  # a worker process wraps its error in a traceback
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _collate(samples: list[tuple[Tensor, int, int]]) -> TrainBatch:
    images, labels, indices = zip(*samples, strict=True)
    return TrainBatch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
