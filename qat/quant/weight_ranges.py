"""The ranges of weights: one for the tensor, or one for each channel, by any calibrator."""

import torch
from torch import Tensor

from qswin.calib.calibrators import Histogram, find_range, squared_errors
from qswin.calib.grid import Grid


def weight_ranges(weight: Tensor, axis: int | None, calibrator: str, grid: Grid) -> Tensor:
    """The range of a weight, or, with an axis, of each index of that dimension.

    Returns:
        () or [C, 1, ...] on the weight's device.

    Raises:
        ValueError: there is no such calibrator, or a value is NaN or infinite.
    """
    amax = largest(weight, axis)
    if calibrator == "max":
        return amax
    if calibrator == "mse":
        return least_squares_amax(weight.detach(), amax, grid)
    channels = weight.detach()[None] if axis is None else weight.detach().movedim(axis, 0)
    found = [_range_of(channel, calibrator, grid) for channel in channels]
    return torch.tensor(found, device=weight.device).reshape(amax.shape)


def largest(weight: Tensor, axis: int | None) -> Tensor:
    """The largest |w| of the tensor, or of each index of a dimension; of `weight_ranges`'s shape."""
    others = [d for d in range(weight.ndim) if d != axis]
    return weight.detach().abs().amax(others, keepdim=axis is not None)


def _range_of(values: Tensor, calibrator: str, grid: Grid) -> float:
    histogram = Histogram()
    histogram.add(values.float().cpu().numpy())
    return find_range(histogram, calibrator, grid)


def least_squares_amax(x: Tensor, amax: Tensor, grid: Grid, candidates: int = 64) -> Tensor:
    """The ranges with the least squared quantization error, of `candidates` even steps from amax / 4 to amax.

    Args:
        x: any shape.
        amax: the largest ranges to try, one or one a channel; of as many dimensions as x, or none.

    Returns:
        Ranges of amax's shape.
    """
    x = x / torch.where(amax > 0, amax, 1.0)  # in units of amax, or the squares of small values vanish
    shares = torch.linspace(0.25, 1.0, candidates)
    errors = squared_errors(x, shares.tolist(), grid, lambda squares: squares.sum_to_size(amax.shape))
    return shares.to(x.device)[torch.stack(errors).argmin(0)] * amax
