"""Draws docs/pictures/streams.png from docs/results/vit-streams.json: python docs/make_streams.py"""

import json
from pathlib import Path

import numpy as np

from qswin.trt.report.plots import pyplot

DOCS = Path(__file__).parent


def draw(path: Path) -> None:
    """The largest magnitude of each channel behind each block; the one channel that explodes, and the range of INT8."""
    largest = np.array(json.loads((DOCS / "results" / "vit-streams.json").read_text())["largest"])
    worst = int(largest.max(0).argmax())
    figure, axes = pyplot().subplots(figsize=(8, 3.6), layout="constrained")
    number = np.arange(len(largest))
    for channel in range(largest.shape[1]):
        if channel != worst:
            axes.plot(number, largest[:, channel], color="0.75", linewidth=0.6)
    axes.plot(number, np.median(largest, axis=1), color="0.2", label="the median of all channels")
    axes.plot(number, largest[:, worst], color="tab:red", label=f"channel {worst}")
    axes.plot(number, largest.max(1) / 127, color="tab:blue", linestyle="--", label="INT8's step for the whole stream")
    axes.set_yscale("log")
    axes.set_xticks(number)
    axes.set_xlabel("block")
    axes.set_ylabel("largest magnitude in the residual stream")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(DOCS / "pictures" / "streams.png")
