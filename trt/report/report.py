"""One HTML page of everything that a run's folder holds. The command `qswin report`."""

import html
import json
import re
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qswin.calib.calibrators import CALIBRATORS, find_range
from qswin.calib.files import write_atomic
from qswin.calib.grid import grid_of
from qswin.calib.histogram_file import HISTOGRAMS, Observation, load_histograms
from qswin.trt.report import plots
from qswin.trt.report.webpage import Part, Picture, table

Records = dict[str, dict[str, Any]]  # {file: its JSON}
Stages = dict[str, dict[str, float]]  # {stage: {quantizer: its largest range}}
SHOWN = ("acc1", "acc5", "dice", "volume_dice", "volume_hd95")
STAGES = ("ptq", "qat")
SENSITIVE = 40  # groups of a sensitivity report that are drawn
PANELS = 12  # histograms a picture
WEIGHT = "_weight_quantizer"


def read_records(run: Path) -> Records:
    """The JSON objects below a folder. Raises ValueError for a file that is cut off."""
    records = {}
    for path in sorted(run.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON, or cut off; delete it, or make it again") from error
        if isinstance(content, dict):
            records[str(path.relative_to(run))] = content
    return records


def draw(plot: Callable[[Any], None], caption: str, height: float = 4) -> Picture:
    """What `plot` puts on a pair of axes, as a picture of the page."""
    data = BytesIO()
    plots.save(plot, data, height=height)
    return Picture(data.getvalue(), caption)


def accuracy(records: Records) -> list[Part]:
    """What `qswin evaluate --json` wrote."""
    found = [(file, r) for file, r in records.items() if "precision" in r and any(name in r for name in SHOWN)]
    metrics = [name for name in SHOWN if any(name in record for _, record in found)]
    rows = [
        [file, r["backend"], r["precision"], *(r.get(name) for name in metrics), r["images"], r["images_per_second"]]
        for file, r in found
    ]
    return [table(["file", "backend", "precision", *metrics, "images", "images/s"], rows)] if rows else []


def speed(records: Records) -> list[Part]:
    """What `qswin bench --json` wrote."""
    keys = ("model", "backend", "precision", "batch", "ms", "images_per_second")
    rows = [row for r in records.values() for row in r.get("rows", ()) if isinstance(row, dict) and set(keys) <= set(row)]
    if not rows:
        return []
    listed = table([*keys[:-1], "images/s"], [[row[key] for key in keys] for row in rows])
    return [listed, draw(lambda axes: plots.throughput(axes, rows), "images/s over the batch")]


def training(run: Path) -> list[Part]:
    """The loss of each step and the metric of each epoch, from every log.jsonl."""
    parts: list[Part] = []
    for path in sorted(run.rglob("log.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        steps = [line for line in lines if "loss" in line]
        epochs = [line for line in lines if "epoch" in line]
        if not steps:
            continue

        def plot(axes: Any, steps: list[dict[str, Any]] = steps) -> None:
            axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=1)
            axes.set(xlabel="step", ylabel="loss")

        parts.append(draw(plot, f"{path.relative_to(run)}: the loss", height=3))
        if epochs:
            names = list(dict.fromkeys(name for line in epochs for name in line))
            parts.append(table(names, [[line.get(name) for name in names] for line in epochs]))
    return parts


def read_ranges(path: Path) -> dict[str, float]:
    """{quantizer: its largest range} of a checkpoint. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith("_quantizer._amax")]  # noqa: SIM118
            return {name.removesuffix("._amax"): float(np.max(file.get_tensor(name))) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no checkpoint") from error


def stage_ranges(run: Path) -> Stages:
    """The ranges of the checkpoints that a run's folder holds, the calibrated one's and the trained one's."""
    return {stage: read_ranges(path) for stage in STAGES if (path := run / f"{stage}.safetensors").is_file()}


def ranges(found: Stages) -> list[Part]:
    """Each quantizer's range after calibration and after training."""
    if not found:
        return []
    names = list(dict.fromkeys(name for stage in found.values() for name in stage))
    both = [name for name in names if all(name in found.get(stage, ()) for stage in STAGES)]
    ratio = {name: found["qat"][name] / found["ptq"][name] for name in both}
    rows = [[name, *(found[stage].get(name) for stage in found), ratio.get(name)] for name in names]
    listed = table(["quantizer", *found, "qat / ptq"], rows)
    if not ratio:
        return [listed]

    def plot(axes: Any) -> None:
        axes.bar(range(len(ratio)), [value - 1 for value in ratio.values()], width=1)
        axes.set(xlabel="quantizer, in the model's order", ylabel="change of its range by training")

    return [draw(plot, "ranges before and after training", height=3), listed]


def histograms(run: Path, stages: Stages) -> list[Part]:
    """What calibration saw at each quantizer, with the range of each calibrator and of each checkpoint."""
    if not (run / HISTOGRAMS).is_file():
        return []
    found = list(load_histograms(run / HISTOGRAMS).items())
    weights = [item for item in found if item[0].endswith(WEIGHT)]
    activations = [item for item in found if not item[0].endswith(WEIGHT)]
    shares = {stage: weight_shares(run / f"{stage}.safetensors") for stage in stages}
    return [
        *pictures(activations, stages, CALIBRATORS, "|x|"),
        *pictures(weights, shares, ["max", "mse"], "|w| as a share of its channel's largest"),
    ]


def weight_shares(path: Path) -> dict[str, float]:
    """{weight quantizer: its range as a share of the largest weight}, the median over the channels.

    Raises:
        ValueError: a quantizer has no weight beside it.
    """
    shares = {}
    with safe_open(path, framework="numpy") as file:
        tensors = set(file.keys())
        for name in sorted(name for name in tensors if name.endswith(f"{WEIGHT}._amax")):
            weight = name.removesuffix(f"{WEIGHT}._amax") + "weight"
            if weight not in tensors:
                raise ValueError(f"{path}: {name} has no {weight}; calibrate or train again")
            amax = file.get_tensor(name).ravel()
            largest = np.abs(file.get_tensor(weight)).reshape(amax.size, -1).max(axis=1)
            if (used := largest > 0).any():
                shares[name.removesuffix("._amax")] = float(np.median(amax[used] / largest[used]))
    return shares


def pictures(found: list[tuple[str, Observation]], stages: Stages, calibrators: Collection[str], what: str) -> list[Part]:
    """The histograms of some quantizers, several to a picture."""
    parts: list[Part] = []
    for start in range(0, len(found), PANELS):
        shown, data = found[start : start + PANELS], BytesIO()
        plots.save_grid([panel(name, observation, stages, calibrators) for name, observation in shown], data)
        parts.append(Picture(data.getvalue(), f"histograms of {what}, from {shown[0][0]} on"))
    return parts


def panel(name: str, observation: Observation, stages: Stages, calibrators: Collection[str]) -> Callable[[Any], None]:
    """Draws one quantizer's histogram."""
    grid = grid_of(observation.format)
    candidates = {calibrator: find_range(observation.histogram, calibrator, grid) for calibrator in calibrators}
    taken = {stage: found[name] for stage, found in stages.items() if name in found}

    def plot(axes: Any) -> None:
        plots.histogram(axes, observation, candidates, taken)
        axes.set_title(f"{name.removesuffix('_quantizer')}, {grid.name}", fontsize=7)

    return plot


def sensitivity(records: Records) -> list[Part]:
    """What `qswin sensitivity` wrote: the groups that cost most."""
    rows = [row for r in records.values() for row in r.get("rows", ()) if isinstance(row, dict) and "alone" in row]
    if not rows:
        return []
    rows.sort(key=lambda row: -row["alone"]["kl"])
    shown = rows[:SENSITIVE]
    metrics = list(rows[0]["alone"])
    values = [[row["name"], *(row[kind][name] for kind in ("alone", "without") for name in metrics)] for row in rows]
    headings = ["quantized", *(f"alone: {name}" for name in metrics), *(f"all but it: {name}" for name in metrics)]
    bars = draw(lambda axes: plots.ranking(axes, shown), "the most sensitive", height=1 + 0.22 * len(shown))
    return [bars, table(headings, values)]


def layers(records: Records) -> list[Part]:
    """What `qswin inspect --json` wrote of an engine or graph, coloured by precision."""
    parts: list[Part] = []
    for file, record in records.items():
        if "layers" in record and isinstance(record["layers"], list):
            found = record["layers"]
            rows = [[r["name"], r["kind"], " ".join(r["inputs"]), " ".join(r["outputs"]), r.get("ms")] for r in found]
            kinds = [" ".join(r["outputs"]).lower().split(" ")[0] for r in found]
            parts.append(f"<h3>{html.escape(file)}</h3>" + table(["layer", "kind", "inputs", "outputs", "ms"], rows, kinds))
    return parts


def worst_images(run: Path) -> list[Part]:
    """What `qswin evaluate --pictures` drew in the folder `pictures` of the run's."""
    return [Picture(path.read_bytes(), path.stem) for path in sorted(run.glob("pictures/*.png"))]


def report(run: Path) -> dict[str, list[Part]]:
    """{heading: its parts} of all that the folder holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing to report, or a file that cannot be read; matplotlib is missing.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    records, stages = read_records(run), stage_ranges(run)
    sections = {
        "Accuracy": accuracy(records),
        "Speed": speed(records),
        "Training": training(run),
        "Sensitivity": sensitivity(records),
        "Ranges": ranges(stages),
        "Histograms": histograms(run, stages),
        "Layers": layers(records),
        "Worst images": worst_images(run),
    }
    found = {heading: content for heading, content in sections.items() if content}
    if not found:
        raise ValueError(f"{run}: nothing to report; calibrate, train, evaluate or bench with its files there (--json)")
    return found


def save_pictures(sections: dict[str, list[Part]], folder: Path) -> int:
    """Writes the pictures as PNGs too, named by their place and caption, and gives how many there are."""
    pictures = [part for parts in sections.values() for part in parts if isinstance(part, Picture)]
    for number, picture in enumerate(pictures, 1):
        name = re.sub(r"[^\w.]+", "-", picture.caption)[:80].strip("-")
        write_atomic(folder / f"{number:02d}-{name}.png", picture.png)
    return len(pictures)
