"""Draws docs/pictures/calibrators.png and prints the table of docs/calibrators.md: python docs/make_calibrators.py

Three shapes of activations that a Swin has, each drawn with seed 0, and what the four calibrators make of them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from qswin.calib.calibrators import CALIBRATORS, Histogram, find_range
from qswin.calib.grid import Grid, grid_of
from qswin.trt.report.plots import pyplot

PICTURE = Path(__file__).parent / "pictures" / "calibrators.png"
VALUES = 1_000_000


def shapes() -> dict[str, np.ndarray]:
    """Values by name."""
    rng = np.random.default_rng(0)
    stream = rng.standard_normal(VALUES)
    stream[:: VALUES // 50] *= 30  # a few channels of the residual stream are huge
    y = 1.5 * rng.standard_normal(VALUES)
    scores = np.exp(3 * rng.standard_normal((VALUES // 49, 49)))
    return {
        "residual stream": stream,
        "behind GELU": y * ndtr(y),
        "softmax over 49": scores / scores.sum(axis=1, keepdims=True),
    }


def quantization_error(values: np.ndarray, amax: float, grid: Grid) -> float:
    """Root of the mean squared error, over the root of the mean square of the values."""
    step = grid.scale(amax)
    error = grid.nearest(values / step) * step - values
    return float(np.sqrt(np.mean(error**2) / np.mean(values**2)))


def table() -> Iterator[str]:
    """Lines of Markdown: each range, and its error at 8 and at 4 bits."""
    yield "| | largest | " + " | ".join(CALIBRATORS) + " |"
    yield "| --- " * (len(CALIBRATORS) + 2) + "|"
    for name, values in shapes().items():
        histogram = filled(values)
        for grid in (grid_of("int8").of_weights, grid_of("int4").of_weights):
            ranges = {calibrator: find_range(histogram, calibrator, grid) for calibrator in CALIBRATORS}
            cells = [f"{amax:.3g} ({100 * quantization_error(values, amax, grid):.2g} %)" for amax in ranges.values()]
            yield f"| {name}, {grid.bits} bits | {histogram.amax:.3g} | " + " | ".join(cells) + " |"


def filled(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def draw(path: Path) -> None:
    """Each shape's histogram with the ranges at 4 bits, where they part most."""
    library = pyplot()
    figure, panels = library.subplots(1, 3, figsize=(12, 3.2))
    for axes, (name, values) in zip(panels, shapes().items(), strict=True):
        histogram = filled(values)
        axes.hist(np.abs(values).ravel(), bins=200, color="0.75", log=True)
        for colour, calibrator in enumerate(CALIBRATORS):
            axes.axvline(find_range(histogram, calibrator, grid_of("int4")), color=f"C{colour}", label=calibrator)
        axes.set(title=name, xlabel="|x|")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    library.close(figure)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    draw(PICTURE)
    print("\n".join(table()))
