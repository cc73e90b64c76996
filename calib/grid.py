"""Number formats: the levels that a tensor is rounded to, in units of its scale. NumPy arrays and torch tensors alike.

All formats are symmetric: the real value of level q is q * scale, and scale = amax / qmax. A format is found by its
name, `grid_of("int8")`, in recipes and files; one from outside of this module is made known by `register_grid`.
"""

import abc
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid(abc.ABC):
    """A number format. A subclass says how to round; all else follows.

    Attributes:
        name: as recipes and files have it.
        bits: of a stored value.
        qmin: the lowest level.
        qmax: the highest level, which stands for amax.
        onnx_type: the name of ONNX's type that stores the levels; None where the format cannot be exported.
        torch_dtype: the name of torch's dtype that stores the levels; None where the format cannot be exported.
        saturates: whether QuantizeLinear to `onnx_type` cuts off at qmin and qmax by itself.
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    onnx_type: str | None = None
    torch_dtype: str | None = None
    saturates: bool = True

    @abc.abstractmethod
    def round(self, x: Any) -> Any:
        """The nearest level to each value of x, an array or tensor, as if the format had no largest level."""

    def clip(self, levels: Any) -> Any:
        """Cuts rounded values off at qmin and qmax. The straight-through gradient is 1 where this changes nothing."""
        return levels.clip(self.qmin, self.qmax)

    def nearest(self, x: Any) -> Any:
        """The level of the format nearest to each value of x, in x's dtype."""
        return self.clip(self.round(x))

    def scale(self, amax: Any) -> Any:
        """The real value of level 1, for a range of |x| <= amax."""
        return amax / self.qmax

    def codes(self, x: np.ndarray) -> np.ndarray:
        """The levels nearest to x, in the integer dtype that stores them. Raises ValueError where NumPy has none."""
        if self.torch_dtype != "int8":
            raise ValueError(f"levels of format {self.name!r} are not stored as integers")
        return self.nearest(x).astype(np.int8)

    @property
    def of_weights(self) -> "Grid":
        """The same format for weights, which leave the lowest level out where it has no opposite."""
        return self if self.qmin == -self.qmax else dataclasses.replace(self, qmin=-self.qmax, saturates=False)


class IntegerGrid(Grid):
    """The integers from qmin to qmax. Ties go to the even level, as in ONNX."""

    def round(self, x: Any) -> Any:
        return x.round()


def integers(bits: int) -> IntegerGrid:
    """The two's complement integers of 2 to 8 bits. All are stored as INT8."""
    half = 2 ** (bits - 1)
    return IntegerGrid(f"int{bits}", bits, -half, half - 1, "INT8", "int8", saturates=bits == 8)


_GRIDS: dict[str, Grid] = {}


def register_grid(grid: Grid) -> None:
    """Makes a format known by its name. Raises ValueError when another format has that name."""
    if _GRIDS.setdefault(grid.name, grid) != grid:
        raise ValueError(f"format {grid.name!r} is already registered; choose another name")


def grid_of(name: str) -> Grid:
    """The format of a name. Raises ValueError, listing the names, when there is none."""
    if name not in _GRIDS:
        raise ValueError(f"format {name!r} is not known; choose {', '.join(_GRIDS)}")
    return _GRIDS[name]


for _bits in range(2, 9):
    register_grid(integers(_bits))
INT8 = grid_of("int8")
