"""Pictures by matplotlib, where it is installed: those that more than one command draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


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
