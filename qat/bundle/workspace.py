"""Where each buffer lies in the workspace: those that are needed at the same time lie apart, others share bytes."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from qswin.qat.bundle.format import aligned

Name = TypeVar("Name", bound=Hashable)


class Lifetime(NamedTuple):
    """A buffer's bytes, the launch that writes it and the last one that reads it."""

    size: int
    first: int
    last: int


def plan_workspace(lifetimes: Mapping[Name, Lifetime]) -> tuple[dict[Name, int], int]:
    """The offset of each buffer, and the bytes of all.

    The largest is placed first, each at the lowest offset where nothing lies that lives when it does ("greedy by size":
    Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020).
    """
    placed: dict[Name, int] = {}
    for name, buffer in sorted(lifetimes.items(), key=lambda item: -item[1].size):
        start = 0
        for other in sorted((n for n in placed if _overlap(buffer, lifetimes[n])), key=placed.__getitem__):
            if start + buffer.size <= placed[other]:
                break
            start = max(start, placed[other] + aligned(lifetimes[other].size))
        placed[name] = start
    return placed, max((placed[name] + aligned(lifetimes[name].size) for name in placed), default=0)


def _overlap(one: Lifetime, other: Lifetime) -> bool:
    return one.first <= other.last and other.first <= one.last
