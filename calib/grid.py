"""Number formats: the values that a tensor is rounded to, in units of its scale. NumPy arrays and torch tensors alike."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class IntegerGrid:
    """The integers qmin..qmax; the real value of level q is q * scale, and scale = amax / qmax.

    Args:
        bits: 2 to 8.
        narrow: leave out the lowest level: [-127, 127] for INT8 weights, [-128, 127] for activations.
    """

    bits: int = 8
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is not supported; choose 2 to 8")

    @property
    def qmax(self) -> int:
        """The level of amax."""
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else -self.qmax - 1

    def nearest(self, x: Any) -> Any:
        """The level nearest to each value of x, an array or tensor in units of the scale; ties go to the even level."""
        return x.round().clip(self.qmin, self.qmax)


INT8 = IntegerGrid(8)  # of activations, and of all that is stored as INT8
