"""Training images decoded, cut and resized by NVIDIA DALI, on the GPU where there is one: `data.decoder: dali`.

Windows and flips are drawn as timm draws for Pillow (qat/training/images.py), from the same seeds: both decoders see
the same pieces of the same images, and a killed run resumes alike. Their pixels differ by what resizing rounds.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from qswin.calib.data.images import Preprocessing, naming_unreadable, open_image, open_source
from qswin.calib.data.shards import ImageFile
from qswin.qat.schema import AugmentConfig
from qswin.qat.training.images import TrainBatch, TrainImages, load_in_order

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")  # that DALI reads as Pillow does, by Pillow's names
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B")
DECODED_AHEAD = 4  # batches at most, of what may have failed when DALI stops
PILLOW_ONLY = ("rotate", "color_jitter", "auto_augment", "random_erase")  # augmentations of Pillow's images only


class Encoded(NamedTuple):
    """An image as it lies in its file; of `header` only the size is read."""

    data: np.ndarray  # (bytes,) uint8
    header: Image.Image


class Piece(NamedTuple):
    """What is to be made of an image; arrays, as DALI takes them."""

    data: np.ndarray  # (bytes,) uint8
    start: np.ndarray  # (2,) int32, top and left
    shape: np.ndarray  # (2,) int32, height and width
    mirror: np.ndarray  # () int32, 1: left to right
    flip: np.ndarray  # () int32, 1: upside down
    label: np.ndarray  # (1,) int64


class EncodedImages(TrainImages):
    """TrainImages for a pipeline: files, unread but for their headers. Made for the transform `DrawPiece`."""

    def read(self, path: ImageFile) -> Encoded:
        """Raises ValueError for what is no image, or of a format that DALI does not read."""
        with naming_unreadable(path), open_source(path) as file:
            data = file.read()
            header = Image.open(io.BytesIO(data))
        if header.format not in FORMATS or header.mode not in MODES:
            what = f"{header.format} of mode {header.mode}"
            raise ValueError(
                f"{path}: DALI does not read {what} as Pillow does; convert it, or set data.decoder=pillow"
            )
        return Encoded(np.frombuffer(data, np.uint8), header)


class DrawPiece:
    """Random resized crop and flips, as numbers. Raises ValueError for augmentations that change colours or angles."""

    def __init__(self, augment: AugmentConfig) -> None:
        for name in PILLOW_ONLY:
            if getattr(augment, name):
                raise ValueError(
                    f"train.augment.{name} is not done by data.decoder=dali; leave it out, or set data.decoder=pillow"
                )
        self.augment = augment

    def __call__(self, image: Encoded, target: int) -> tuple[Piece]:
        augment = self.augment
        window = RandomResizedCropAndInterpolation.get_params(image.header, augment.scale, augment.ratio)
        # timm has no transform for a probability of 0, so nothing is drawn for it.
        flips = [p > 0 and torch.rand(1).item() < p for p in (augment.hflip, augment.vflip)]
        start, shape, mirror, flip = (np.array(part, np.int32) for part in (window[:2], window[2:], *flips))
        return (Piece(image.data, start, shape, mirror, flip, np.array([target])),)


def load_batches(
    dataset: EncodedImages,
    batches: Sequence[list[int]],
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
) -> Iterator[TrainBatch]:
    """Yields the given batches, in order, their images on `device`. `workers` processes read, as many threads decode.

    Raises:
        ValueError: DALI is not installed; a file is no image, or is damaged.
    """
    try:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator
    except ModuleNotFoundError as error:
        raise ValueError("data.decoder=dali needs NVIDIA DALI: pip install 'qswin[dali]'") from error
    pieces = load_in_order(dataset, batches, workers, _collate)
    pipeline = _pipeline(pieces, max(map(len, batches), default=1), preprocessing, max(workers, 1), device)
    done = 0
    try:
        for (batch,) in DALIGenericIterator(pipeline, ["images", "labels", "indices"]):
            yield TrainBatch(batch["images"], batch["labels"][:, 0], batch["indices"][:, 0])
            done += 1
    except RuntimeError as error:
        _check(dataset, batches[done : done + DECODED_AHEAD])
        raise ValueError(
            f"DALI stopped ({' '.join(str(error).split())}); data.decoder=pillow does without it"
        ) from error


def _check(dataset: EncodedImages, batches: Sequence[list[int]]) -> None:
    """Raises ValueError for the first image that Pillow cannot decode either: DALI does not say which it could not."""
    for path, _ in (dataset.folder.samples[index] for batch in batches for index in batch):
        try:
            open_image(path)
        except ValueError as error:
            what = "damaged, and DALI stops at it; mend or remove it, or set data.decoder=pillow"
            raise ValueError(f"{path}: {what}") from error


def _collate(samples: list[tuple[Piece, int]]) -> tuple[list[Any], ...]:
    """A list for each part of a piece, and the indices."""
    return *map(list, zip(*(piece for piece, _ in samples), strict=True)), [np.array([index]) for _, index in samples]


def _pipeline(
    pieces: Iterator[tuple[list[Any], ...]],
    batch_size: int,
    preprocessing: Preprocessing,
    threads: int,
    device: torch.device,
) -> Any:
    """The DALI pipeline of images (N, 3, H, W) float32, normalised, labels (N, 1) and indices (N, 1)."""
    from nvidia.dali import Pipeline, fn, types

    interpolation = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}[preprocessing.interpolation]
    mean, std = ([255 * value for value in values] for values in (preprocessing.mean, preprocessing.std))
    inputs = [types.UINT8, types.INT32, types.INT32, types.INT32, types.INT32, types.INT64, types.INT64]
    gpu = device.type == "cuda"
    with Pipeline(batch_size, threads, torch.cuda.current_device() if gpu else None) as pipeline:
        data, start, shape, mirror, flip, labels, indices = fn.external_source(pieces, len(inputs), dtype=inputs)
        images = fn.decoders.image(
            data,
            device="mixed" if gpu else "cpu",
            adjust_orientation=False,  # nor does Pillow turn an image as its EXIF data says
            jpeg_fancy_upsampling=True,  # colours as libjpeg's; on a GPU only for whole images, so it is cut afterwards
        )
        images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
        images = fn.resize(images, size=preprocessing.size, interp_type=interpolation, antialias=True)
        images = fn.flip(images, horizontal=mirror, vertical=flip)
        images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
        pipeline.set_outputs(images, labels, indices)
    return pipeline
