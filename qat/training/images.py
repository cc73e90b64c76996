"""Training images: augmented, with labels, in an order and with random numbers that depend on the seed only.

All random numbers come from a generator seeded by (seed, stream, epoch, image) or (seed, stream, batch, rank), so there
is no state to save: a run that is killed at any step resumes with the same batches, however many processes decode.
"""

import enum
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from absl import logging
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from qswin.calib.data.folders import ImageFolder
from qswin.calib.data.images import Preprocessing, check_size, open_image
from qswin.calib.data.shards import ImageFile
from qswin.qat.schema import AugmentConfig

LARGEST_IN_POLICY = 100  # of the numbers in an `auto_augment`: magnitudes, layers, chains


class TrainBatch(NamedTuple):
    images: Tensor  # (N, 3, H, W) float32, normalised
    labels: Tensor  # (N,) int64 class indices, or (N, H, W) uint8 masks
    indices: Tensor  # (N,) int64, of the folder's samples


class Stream(enum.IntEnum):
    """Random streams of one seed, independent of each other."""

    AUGMENTATION = 1  # of one image in one epoch
    ORDER = 2  # of an epoch's images
    FORWARD = 3  # mixup, drop path and dropout of one batch of a rank
    WEIGHTS = 4  # of a model that starts without a checkpoint


def seed_everything(seed: int, stream: Stream, *key: int) -> None:
    """Seeds Python, NumPy and torch for what `key` names in a stream: (epoch, image), (batch, rank), or nothing."""
    state = np.random.SeedSequence((seed, stream, *key)).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state % 2**32))
    torch.manual_seed(int(state % 2**63))


def check_policy(policy: str) -> None:
    """Raises ValueError for an `auto_augment` that timm does not know, or whose numbers would take for ever."""
    wanted = "give one of timm, for instance rand-m9-mstd0.5-inc1"
    if any(float(number) > LARGEST_IN_POLICY for number in re.findall(r"\d+(?:\.\d+)?", policy)):
        raise ValueError(f"train.augment.auto_augment={policy}: a number is above {LARGEST_IN_POLICY}; {wanted}")
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"train.augment.auto_augment={policy} is not a policy; {wanted}") from error


class ClassificationTransform:
    """timm's training transform: random resized crop, flips, colour, RandAugment, erasing."""

    def __init__(self, preprocessing: Preprocessing, augment: AugmentConfig) -> None:
        if augment.auto_augment is not None:
            check_policy(augment.auto_augment)
        self._change = create_transform(
            (3, *preprocessing.size),
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erase,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
        )

    def __call__(self, image: Image.Image, target: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) float32, and the class index."""
        return self._change(image), torch.tensor(target)


class SegmentationTransform:
    """Flips, rotation, resized crop and colour of an image, the same geometry for its mask."""

    def __init__(self, preprocessing: Preprocessing, augment: AugmentConfig) -> None:
        self._change = v2.Compose(
            [
                v2.RandomHorizontalFlip(augment.hflip),
                v2.RandomVerticalFlip(augment.vflip),
                v2.RandomRotation(augment.rotate, v2.InterpolationMode.BILINEAR),
                v2.RandomResizedCrop(
                    preprocessing.size, augment.scale, augment.ratio, v2.InterpolationMode(preprocessing.interpolation)
                ),
                v2.ColorJitter(*[augment.color_jitter] * 3),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(preprocessing.mean, preprocessing.std),
            ]
        )

    def __call__(self, image: Image.Image, target: Path) -> tuple[Tensor, Tensor]:
        """(3, H, W) float32, and the mask (H, W) uint8. Raises ValueError when the two files differ in size."""
        mask = open_image(target)
        check_size(target, mask, image)
        changed = self._change(v2.functional.to_image(image), tv_tensors.Mask(np.array(mask)))
        return changed[0].as_subclass(Tensor), changed[1].as_subclass(Tensor)


Transform = Callable[[Any, Any], tuple[Any, ...]]  # (what TrainImages reads, its target)
TRANSFORMS: dict[str, Callable[[Preprocessing, AugmentConfig], Transform]] = {
    "classification": ClassificationTransform,
    "segmentation": SegmentationTransform,
}
UNSUPPORTED = {"classification": ("rotate",), "segmentation": ("auto_augment", "random_erase", "mixup", "cutmix")}


def train_transform(task: str, preprocessing: Preprocessing, augment: AugmentConfig) -> Transform:
    """What a task's training images and labels go through. Raises ValueError for augmentations that the task lacks."""
    for name in UNSUPPORTED[task]:
        if getattr(augment, name):
            raise ValueError(f"train.augment.{name} is not for {task}; leave it out")
    return TRANSFORMS[task](preprocessing, augment)


class TrainImages(Dataset[tuple[Any, ...]]):
    """One epoch's images, augmented: (image, label, index). An unreadable one, if skipped, yields to the next."""

    def __init__(self, folder: ImageFolder, transform: Transform, seed: int, epoch: int, skip_unreadable: bool) -> None:
        self.folder, self.transform = folder, transform
        self.seed, self.epoch, self.skip_unreadable = seed, epoch, skip_unreadable
        self._unreadable: set[int] = set()  # found so: a long row of them is opened once, not once an image

    def __len__(self) -> int:
        return len(self.folder.samples)

    def read(self, path: ImageFile) -> Any:
        """What the transform takes. Raises ValueError for an unreadable file."""
        return open_image(path, "RGB")

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index, image, target = self._first_readable(index)
        seed_everything(self.seed, Stream.AUGMENTATION, self.epoch, index)
        return *self.transform(image, target), index

    def _first_readable(self, index: int) -> tuple[int, Any, Any]:
        """The first sample from `index` on whose image can be read: its index, image and target.

        Raises:
            ValueError: an image cannot be read and is not to be skipped, or none can be read.
        """
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            if at in self._unreadable:
                continue
            path, target = self.folder.samples[at]
            try:
                return at, self.read(path), target
            except ValueError:
                if not self.skip_unreadable:
                    raise
                logging.warning("%s: unreadable, skipped", path)
                self._unreadable.add(at)
        raise ValueError(f"{self.folder.root}: none of its {len(self)} images can be read")


def epoch_batches(images: int, batch_size: int, rank: int, world: int, seed: int, epoch: int) -> list[list[int]]:
    """This rank's batches of one epoch: a permutation of all images, dealt to the ranks, without a short last batch."""
    order = np.random.default_rng((seed, Stream.ORDER, epoch)).permutation(images)
    steps = images // (batch_size * world)
    dealt = order[: steps * batch_size * world].reshape(steps, world, batch_size)
    return dealt[:, rank].tolist()


def load_batches(dataset: TrainImages, batches: Sequence[list[int]], workers: int) -> Iterator[TrainBatch]:
    """Yields the given batches, in order. Raises ValueError, in one line, for an image that cannot be read."""
    return load_in_order(dataset, batches, workers, _collate, pin_memory=torch.cuda.is_available())


def load_in_order(
    dataset: TrainImages,
    batches: Sequence[list[int]],
    workers: int,
    collate: Callable[[list[Any]], Any],
    **options: Any,
) -> Iterator[Any]:
    """What `collate` makes of each batch's samples. Raises ValueError, in one line, for an unreadable image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # said once, by TrainingData
        loaded = iter(
            DataLoader(dataset, batch_sampler=list(batches), num_workers=workers, collate_fn=collate, **options)
        )
    try:
        yield from loaded
    except ValueError as error:  # a worker process wraps its error in a traceback
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _collate(samples: list[tuple[Tensor, Tensor, int]]) -> TrainBatch:
    images, labels, indices = zip(*samples, strict=True)
    return TrainBatch(torch.stack(images), torch.stack(labels), torch.tensor(indices))
