"""The ranges of a run's checkpoints, and the histograms that they were chosen from, as sections of the report."""

import html
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from qswin.calib.calibrators import CALIBRATORS, find_range
from qswin.calib.grid import grid_of
from qswin.calib.histogram_file import HISTOGRAMS, Observation, load_histograms
from qswin.trt.report import plots
from qswin.trt.report.folder import RunFolder
from qswin.trt.report.webpage import Gallery, Part, table

STAGES = ("ptq", "qat")
MOST_HISTOGRAMS = 5000
PICTURE = {"width": 4, "height": 3, "pixels": 640, "margins": plots.BELOW}  # of a histogram
WEIGHT = "_weight_quantizer"
RANGE = "._amax"


class Ranges(NamedTuple):
    """The ranges of a checkpoint, by quantizer."""

    largest: dict[str, float]  # over the channels
    shares: dict[
        str, float
    ]  # of weights: the range as a share of the channel's largest weight, the median over the channels


Stages = dict[str, Ranges]


def stage_ranges(folder: RunFolder) -> Stages:
    """The ranges of `ptq.safetensors` and `qat.safetensors`, by stage, of those that the folder holds."""
    found: Stages = {}
    for stage in STAGES:
        for _, ranges in folder.read(f"{stage}.safetensors", read_ranges):
            found[stage] = ranges
    return found


def read_ranges(path: Path) -> Ranges:
    """The ranges of a checkpoint.

    Raises:
        ValueError: the file is truncated or not a checkpoint, or a quantizer has no weight beside it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            ranges = {name.removesuffix(RANGE): file.get_tensor(name) for name in names if is_range(name)}
            weights = {name: name.removesuffix(WEIGHT) + "weight" for name in ranges if name.endswith(WEIGHT)}
            for name, weight in weights.items():
                if weight not in names:
                    raise ValueError(f"{path}: {name} is there, but not {weight}; calibrate or train again")
            found = {name: share(ranges[name], file.get_tensor(weight)) for name, weight in weights.items()}
            largest = {name: float(np.max(amax)) for name, amax in ranges.items()}
    except (SafetensorError, TypeError) as error:  # TypeError: of a number format that NumPy lacks
        raise ValueError(f"{path}: truncated, or not a checkpoint") from error
    return Ranges(largest, {name: value for name, value in found.items() if value is not None})


def is_range(name: str) -> bool:
    """Whether a tensor's name is that of a quantizer's range."""
    return name.endswith(f"_quantizer{RANGE}")


def share(amax: np.ndarray, weight: np.ndarray) -> float | None:
    """A weight's range as a share of the largest weight, the median over the channels; None where all weights are 0.

    Args:
        amax: a value for each channel, or one.
        weight: the channels are its first dimension.
    """
    ranges = amax.ravel()
    largest = np.abs(weight).reshape(ranges.size, -1).max(axis=1)
    used = largest > 0
    return float(np.median(ranges[used] / largest[used])) if used.any() else None


def range_table(stages: Stages) -> list[Part]:
    """Each quantizer's range after calibration and after training."""
    if not stages:
        return []
    found = {stage: ranges.largest for stage, ranges in stages.items()}
    names = list(dict.fromkeys(name for ranges in found.values() for name in ranges))
    both = [name for name in names if all(name in found.get(stage, ()) for stage in STAGES)]
    ratio = {name: found["qat"][name] / found["ptq"][name] for name in both if found["ptq"][name] > 0}
    rows = [[name, *(found[stage].get(name) for stage in found), ratio.get(name)] for name in names]
    listed = table(["quantizer", *found, "qat / ptq"], rows)
    if all(value == 1 for value in ratio.values()):  # training moved none, or there was none
        return [listed]

    def plot(axes: Any) -> None:
        axes.bar(range(len(ratio)), [value - 1 for value in ratio.values()], width=1)
        axes.set(xlabel="quantizer, in the model's order", ylabel="change of its range by training")

    return [plots.picture(plot, "ranges before and after training", height=3), listed]


def histograms(folder: RunFolder, stages: Stages) -> list[Part]:
    """What calibration saw at each quantizer, with the range of each calibrator and of each checkpoint."""
    found: list[tuple[str, Observation]] = []
    for path, observations in folder.read(HISTOGRAMS, load_histograms):
        found = list(observations.items())
        if len(found) > MOST_HISTOGRAMS:
            folder.skip(path, f"it has more than {MOST_HISTOGRAMS} histograms")
            return []
    weights = [item for item in found if item[0].endswith(WEIGHT)]
    activations = [item for item in found if not item[0].endswith(WEIGHT)]
    largest = {stage: ranges.largest for stage, ranges in stages.items()}
    shares = {stage: ranges.shares for stage, ranges in stages.items()}
    return [
        *gallery(activations, largest, CALIBRATORS, "|x|"),
        *gallery(weights, shares, ["max", "mse"], "|w| as a share of its channel's largest"),
    ]


def gallery(
    found: list[tuple[str, Observation]], taken: dict[str, dict[str, float]], calibrators: Collection[str], what: str
) -> list[Part]:
    """The histograms of some quantizers, below a line that says of what.

    Args:
        taken: {stage: {quantizer: its range}} of the checkpoints.
    """
    drawn = [
        plots.picture(plot_of(name, observation, taken, calibrators), name, **PICTURE) for name, observation in found
    ]
    return [f"<p>How often each {html.escape(what)} was seen.</p>", Gallery(drawn)] if drawn else []


def plot_of(
    name: str, observation: Observation, taken: dict[str, dict[str, float]], calibrators: Collection[str]
) -> plots.Plot:
    """Draws one quantizer's histogram."""
    grid = grid_of(observation.format)
    candidates = {calibrator: find_range(observation.histogram, calibrator, grid) for calibrator in calibrators}
    own = {stage: ranges[name] for stage, ranges in taken.items() if name in ranges}

    def plot(axes: Any) -> None:
        plots.histogram(axes, observation, candidates, own)
        axes.set_title(plots.label(f"{name.removesuffix('_quantizer')}, {grid.name}"), fontsize=8)

    return plot
