"""Number formats: the levels that a tensor is rounded to, in units of its scale. NumPy arrays and torch tensors alike.

The real value of level q is q * scale, and scale = amax / qmax; level 0 is 0. A format is found by its name,
`grid_of("int8")`, in recipes and files; one from outside of this module is made known by `register_grid`.
"""

import abc
import dataclasses
from typing import Any

import ml_dtypes
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
        opset: the first of ONNX whose QuantizeLinear knows `onnx_type`.
        saturates: whether QuantizeLinear to `onnx_type` cuts off at qmin and qmax by itself.
        even: whether the levels are evenly spaced. Where they are not, small values keep their precision beside large
            ones, so that neither clipping nor equalization gains anything.
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    onnx_type: str | None = None
    torch_dtype: str | None = None
    opset: int = 13
    saturates: bool = True
    even: bool = True

    @property
    def calibrator(self) -> str:
        """The calibrator of activations where a recipe names none."""
        return "mse" if self.even else "max"

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
        """The levels nearest to x, in the dtype that stores them. Raises ValueError for a format that is not stored."""
        if self.torch_dtype is None:
            raise ValueError(f"levels of format {self.name!r} are not stored")
        return self.nearest(x).astype(getattr(ml_dtypes, self.torch_dtype, self.torch_dtype))

    @property
    def of_weights(self) -> "Grid":
        """The same format for weights, which leave the lowest level out where it has no opposite.

        Raises:
            ValueError: the format has no negative levels.
        """
        if self.qmin == 0:
            raise ValueError(f"format {self.name!r} has no negative levels, which weights need; choose another")
        return self if self.qmin == -self.qmax else dataclasses.replace(self, qmin=-self.qmax, saturates=False)


class IntegerGrid(Grid):
    """The integers from qmin to qmax. Ties go to the even level, as in ONNX."""

    def round(self, x: Any) -> Any:
        return x.round()


_FP8_TIE = 464.0  # halfway between 448 and 480, which would be the next level


class FP8Grid(Grid):
    """E4M3, without infinities: 4 bits of exponent, 3 of mantissa, from 2**-9 to 448; ties go to the even mantissa.

    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3. NaN stays NaN.
    """

    def round(self, x: Any) -> Any:
        """As ONNX and torch round; what would round beyond 448 is left as it is."""
        clipped = self.clip(x)
        if isinstance(x, np.ndarray):
            return np.where(abs(x) <= _FP8_TIE, clipped.astype(ml_dtypes.float8_e4m3fn).astype(x.dtype), x)
        import torch  # x is a tensor

        return torch.where(x.abs() <= _FP8_TIE, clipped.to(torch.float8_e4m3fn).to(x.dtype), x)


def integers(bits: int) -> IntegerGrid:
    """The two's complement integers of 2 to 8 bits. All are stored as INT8."""
    half = 2 ** (bits - 1)
    return IntegerGrid(f"int{bits}", bits, -half, half - 1, "INT8", "int8", saturates=bits == 8)


_GRIDS: dict[str, Grid] = {}


def register_grid(grid: Grid) -> None:
    """Makes a format known by its name. Raises ValueError when another format has that name."""
    if _GRIDS.setdefault(grid.name, grid) != grid:
        raise ValueError(f"format {grid.name!r} is already registered; choose another name")


def formats() -> tuple[str, ...]:
    """The names of all formats that are known."""
    return tuple(_GRIDS)


def grid_of(name: str) -> Grid:
    """The format of a name. Raises ValueError, listing the names, when there is none."""
    if name not in _GRIDS:
        raise ValueError(f"format {name!r} is not known; choose {', '.join(_GRIDS)}")
    return _GRIDS[name]


for _bits in range(2, 9):
    register_grid(integers(_bits))
FP8 = FP8Grid("fp8", 8, -448.0, 448.0, "FLOAT8E4M3FN", "float8_e4m3fn", opset=19, even=False)
UINT8 = IntegerGrid("uint8", 8, 0, 255, "UINT8", "uint8")
for _grid in (UINT8, FP8):
    register_grid(_grid)
INT8 = grid_of("int8")
