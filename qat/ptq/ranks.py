"""What the processes of torchrun find together. A process alone finds it by itself."""

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """The values of all ranks, reduced in place; on a device that the process group's backend serves."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def gathered(images: list[Tensor]) -> list[Tensor]:
    """The images of all ranks, the first of each, then the second of each, and so on; sizes may differ."""
    if not dist.is_initialized():
        return images
    parts = [images] * dist.get_world_size()
    dist.all_gather_object(parts, [image.cpu() for image in images])
    device = images[0].device
    return [image.to(device) for row in itertools.zip_longest(*parts) for image in row if image is not None]


def of_first_rank(find: Callable[[], T]) -> T:
    """What `find` returns on the first rank, which alone calls it."""
    if not dist.is_initialized():
        return find()
    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]
