"""How large a model may be that a file asks for: said before it is built, and counted while it is.

The environment variable QSWIN_LIMITS multiplies every limit (qswin/limits.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qswin.limits import MORE, scale

SCALE = scale()
LARGEST_SETTING = int(8192 * SCALE)  # of a size, width or count of an architecture
LARGEST_CLASSES = int(1_000_000 * SCALE)
MOST_BLOCKS = int(512 * SCALE)  # of a model; `depth` or the sum of `depths`
MOST_STAGES = 64  # entries of a list
MOST_VALUES = int(2**30 * SCALE)  # of weights and buffers; 4 GiB in float32
DEPTHS = ("depth", "depths")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the setting, unless all are plain data of a size that a model can have."""
    for name, value in settings.items():
        _check_plain(name, value)
        numbers = value if isinstance(value, list | tuple) else [value]
        if name.endswith("_rate") and not all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in numbers):
            raise ValueError(f"{name}={value}: give a share, 0 or more and below 1")
        if name in DEPTHS and sum(number for number in numbers if isinstance(number, int)) > MOST_BLOCKS:
            raise ValueError(f"{name}={value}: at most {MOST_BLOCKS} blocks are built; {MORE}")


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        if len(value) > MOST_STAGES:
            raise ValueError(f"{name} has {len(value)} entries; give at most {MOST_STAGES}")
        for entry in value:
            _check_plain(name, entry)
    elif isinstance(value, int | float):
        if not abs(value) <= LARGEST_SETTING:  # NaN is not either
            raise ValueError(f"{name}={value:.6g} is not between -{LARGEST_SETTING} and {LARGEST_SETTING}; {MORE}")
    elif not isinstance(value, str | None):
        raise ValueError(f"{name} is a {type(value).__name__}; give a number, text, or a list of them")


class Bounded(TorchDispatchMode):
    """While it is entered, refuses to make more than `MOST_VALUES` values of tensors, before they are made.

    A tensor's size is known before it is allocated where it is an argument (torch.empty, of which parameters are made),
    and where a pointwise operation broadcasts its operands. Any other operation gives about as much as it takes.

    Raises:
        ValueError: the tensors would have more values together.
    """

    def __init__(self, model: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.total = model, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.total += _values_made(func, args)
        if self.total > MOST_VALUES:
            raise ValueError(f"model {self.model!r}: it would have more than {MOST_VALUES:.3g} values; {MORE}")
        return func(*args, **(kwargs or {}))


def _values_made(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """How many values an operation allocates; 0 for one that works in place or whose result's size is not foreseen."""
    name = str(func).split(".")[1]
    if name in ("empty", "zeros", "ones", "full", "rand", "randn"):
        return math.prod(args[0])
    if name == "arange":
        return int(max(args))
    if torch.Tag.pointwise not in getattr(func, "tags", ()) or name.endswith("_"):
        return 0
    return math.prod(torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor))))
