"""Pictures by matplotlib, where it is installed: those that more than one command draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qswin.calib.histogram_file import Observation

Row = dict[str, Any]
HISTOGRAM_BINS = 120  # as many as a panel can show


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from error
    return pyplot


def save(draw: Callable[[Any], None], target: Path | BinaryIO, width: float = 8, height: float = 4) -> None:
    """Writes what `draw` puts on a pair of axes as a PNG. Raises ValueError where matplotlib is missing."""
    library = pyplot()
    figure, axes = library.subplots(figsize=(width, height))
    draw(axes)
    figure.savefig(target, format="png", dpi=120, bbox_inches="tight")
    library.close(figure)


def save_grid(draws: Sequence[Callable[[Any], None]], target: Path | BinaryIO, columns: int = 3) -> None:
    """Writes one PNG of several pairs of axes, row by row. Raises ValueError where matplotlib is missing."""
    library, rows = pyplot(), -(-len(draws) // columns)
    figure, panels = library.subplots(rows, columns, figsize=(4 * columns, 2.4 * rows), squeeze=False)
    figure.subplots_adjust(0.03, 0.12 / rows, 0.99, 1 - 0.12 / rows, 0.12, 0.25)  # a layout engine takes three times as long
    for axes, draw in zip(panels.flat, draws, strict=False):
        draw(axes)
    for unused in panels.flat[len(draws) :]:
        unused.axis("off")
    figure.savefig(target, format="png", dpi=80)
    library.close(figure)


def throughput(axes: Any, rows: Sequence[Row]) -> None:
    """Images/s over the batch size, a line for each model, backend and precision of `qswin bench`'s rows."""
    for name in dict.fromkeys((row["model"], row["backend"], row["precision"]) for row in rows):
        line = [row for row in rows if (row["model"], row["backend"], row["precision"]) == name]
        axes.plot([row["batch"] for row in line], [row["images_per_second"] for row in line], "o-", label=" ".join(name))
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)


def ranking(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each group of `qswin sensitivity`'s rows, the first on top."""
    shown = rows[::-1]
    axes.barh([row["name"] for row in shown], [row["alone"]["kl"] for row in shown])
    axes.set(xlabel="KL from the float model, quantized alone", xscale="log")
    axes.tick_params(labelsize=7)


def histogram(axes: Any, observation: Observation, candidates: dict[str, float], taken: dict[str, float]) -> None:
    """How often |x| was seen, with every calibrator's range (coloured) and those of the checkpoints (black)."""
    counts = observation.histogram.rebinned(HISTOGRAM_BINS)
    axes.stairs(counts, np.linspace(0, observation.histogram.amax, HISTOGRAM_BINS + 1), fill=True, color="0.8")
    for colour, (name, amax) in enumerate(candidates.items()):
        axes.axvline(amax, color=f"C{colour}", label=f"{name} {amax:.3g}")
    for style, (name, amax) in zip(("-", "--"), taken.items(), strict=False):
        axes.axvline(amax, color="black", linewidth=1, linestyle=style, ymax=0.5, label=f"{name} {amax:.3g}")
    axes.set(yscale="log", ylim=(0.5, None), xlim=(0, 1.35 * observation.histogram.amax))  # the legend stands on the right
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, loc="upper right")
