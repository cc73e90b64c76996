"""The pictures of the report and of `--plot`, drawn by matplotlib where it is installed."""

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from qswin.calib.files import write_atomic
from qswin.calib.histogram_file import Observation
from qswin.calib.messages import printable
from qswin.trt.report.webpage import Picture

Row = dict[str, Any]
Plot = Callable[[Any], None]  # draws on a pair of axes
LABEL = 80  # letters of a name
PIXELS = 960  # the width of a picture
HISTOGRAM_BINS = 120  # as many as a picture can show
Margins = tuple[float, float, float, float]  # left, bottom, right and top, as shares of a picture
BELOW: Margins = (0.1, 0.34, 0.97, 0.9)  # room for a legend of three lines below the axes


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from error
    return pyplot


def save(draw: Plot, path: Path, **options: Any) -> None:
    """Writes a PNG of a plot; the options are those of `png`. Raises as `png` and `write_atomic`."""
    write_atomic(path, png(draw, **options))


def png(draw: Plot, width: float = 8, height: float = 4, pixels: int = PIXELS, margins: Margins | None = None) -> bytes:
    """A PNG of a plot.

    Args:
        draw: draws on the axes that it is given.
        width, height: in inches.
        pixels: the width.
        margins: None fits them to the labels, which takes longer than drawing does.

    Raises:
        ValueError: matplotlib is missing.
    """
    library = pyplot()
    figure, axes = library.subplots(figsize=(width, height))
    draw(axes)
    if margins is not None:
        figure.subplots_adjust(*margins)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=pixels / width, bbox_inches="tight" if margins is None else None)
    library.close(figure)
    return data.getvalue()


def picture(draw: Plot, caption: str, **options: Any) -> Picture:
    """A plot as a picture of the page; the options are those of `png`."""
    return Picture(png(draw, **options), caption)


def label(text: str) -> str:
    """A name as matplotlib shows it: short, and without formulas, which stand between dollars."""
    return printable(text[-LABEL:]).replace("$", r"\$")


def throughput(axes: Any, rows: Sequence[Row]) -> None:
    """Images/s over the batch size, a line for each model, backend and precision of `qswin bench`'s rows."""
    for name in dict.fromkeys((row["model"], row["backend"], row["precision"]) for row in rows):
        line = [row for row in rows if (row["model"], row["backend"], row["precision"]) == name]
        batches, rates = ([row[key] for row in line] for key in ("batch", "images_per_second"))
        axes.plot(batches, rates, "o-", label=label(" ".join(name)))
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)


def ranking(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each group of `qswin sensitivity`'s rows, the first on top."""
    shown = rows[::-1]
    costs = [row["alone"]["kl"] for row in shown]
    axes.barh([label(row["name"]) for row in shown], [cost if math.isfinite(cost) else 0 for cost in costs])
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
    axes.set(yscale="log", ylim=(0.5, None), xlim=(0, 1.02 * observation.histogram.amax))
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False)
