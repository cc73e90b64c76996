"""A few images in batches of bounded size, for what needs many passes over them. Images may differ in size."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PIXELS = 256 * 256  # of an image of the usual size


def batches_of(images: Iterable[Tensor], count: int, batch: int) -> list[Tensor]:
    """The first images, those of one size together.

    Of images larger than 256 x 256 fewer are taken, and fewer at a time: as many pixels, so that memory is bounded.

    Args:
        images: (3, H, W) each.
        count: how many images to take.
        batch: how many images a batch holds.

    Returns:
        (N, 3, H, W) each.
    """
    by_size: dict[torch.Size, list[Tensor]] = {}
    for image in _first(images, count):
        by_size.setdefault(image.shape, []).append(image)
    return [
        part
        for same in by_size.values()
        for part in torch.stack(same).split(max(1, min(batch, batch * PIXELS // same[0][0].numel())))
    ]


def _first(images: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """At most `count` images, at least one, that have as many pixels as `count` usual ones."""
    taken = pixels = 0
    for image in images:
        pixels += image[0].numel()
        if taken == count or (taken and pixels > count * PIXELS):
            return
        taken += 1
        yield image
