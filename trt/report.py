"""One HTML page of everything that a run's folder holds. The command `qswin report`."""

import argparse
import html
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from calib.files import write_atomic, write_json
from trt import plots
from trt.webpage import page, picture, table

Records = dict[str, dict[str, Any]]  # {file: its JSON}
SHOWN = ("acc1", "acc5", "dice", "volume_dice", "volume_hd95")
STAGES = ("ptq", "qat")
SENSITIVE = 40  # groups of a sensitivity report that are drawn


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


def draw(plot: Callable[[Any], None], caption: str, height: float = 4) -> str:
    """What `plot` puts on a pair of axes, as a picture of the page."""
    data = BytesIO()
    plots.save(plot, data, height=height)
    return picture(data.getvalue(), caption)


def accuracy(records: Records) -> str:
    """What `qswin evaluate --json` wrote."""
    found = [(file, r) for file, r in records.items() if "precision" in r and any(name in r for name in SHOWN)]
    metrics = [name for name in SHOWN if any(name in record for _, record in found)]
    rows = [
        [file, r["backend"], r["precision"], *(r.get(name) for name in metrics), r["images"], r["images_per_second"]]
        for file, r in found
    ]
    return table(["file", "backend", "precision", *metrics, "images", "images/s"], rows) if rows else ""


def speed(records: Records) -> str:
    """What `qswin bench --json` wrote."""
    keys = ("model", "backend", "precision", "batch", "ms", "images_per_second")
    rows = [row for r in records.values() for row in r.get("rows", ()) if isinstance(row, dict) and set(keys) <= set(row)]
    if not rows:
        return ""
    listed = table([*keys[:-1], "images/s"], [[row[key] for key in keys] for row in rows])
    return listed + draw(lambda axes: plots.throughput(axes, rows), "images/s over the batch")


def training(run: Path) -> str:
    """The loss of each step and the metric of each epoch, from every log.jsonl."""
    parts = []
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
    return "".join(parts)


def read_ranges(path: Path) -> dict[str, float]:
    """{quantizer: its largest range} of a checkpoint. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith("_quantizer._amax")]  # noqa: SIM118
            return {name.removesuffix("._amax"): float(np.max(file.get_tensor(name))) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no checkpoint") from error


def ranges(run: Path) -> str:
    """Each quantizer's range after calibration and after training."""
    found = {stage: read_ranges(path) for stage in STAGES if (path := run / f"{stage}.safetensors").is_file()}
    if not found:
        return ""
    names = list(dict.fromkeys(name for stage in found.values() for name in stage))
    both = [name for name in names if all(name in found.get(stage, ()) for stage in STAGES)]
    ratio = {name: found["qat"][name] / found["ptq"][name] for name in both}
    rows = [[name, *(found[stage].get(name) for stage in found), ratio.get(name)] for name in names]
    listed = table(["quantizer", *found, "qat / ptq"], rows)
    if not ratio:
        return listed

    def plot(axes: Any) -> None:
        axes.bar(range(len(ratio)), [value - 1 for value in ratio.values()], width=1)
        axes.set(xlabel="quantizer, in the model's order", ylabel="change of its range by training")

    return draw(plot, "ranges before and after training", height=3) + listed


def sensitivity(records: Records) -> str:
    """What `qswin sensitivity` wrote: the groups that cost most."""
    rows = [row for r in records.values() for row in r.get("rows", ()) if isinstance(row, dict) and "alone" in row]
    if not rows:
        return ""
    rows.sort(key=lambda row: -row["alone"]["kl"])
    shown = rows[:SENSITIVE]
    metrics = list(rows[0]["alone"])
    values = [[row["name"], *(row[kind][name] for kind in ("alone", "without") for name in metrics)] for row in rows]
    headings = ["quantized", *(f"alone: {name}" for name in metrics), *(f"all but it: {name}" for name in metrics)]
    bars = draw(lambda axes: plots.ranking(axes, shown), "the most sensitive", height=1 + 0.22 * len(shown))
    return bars + table(headings, values)


def layers(records: Records) -> str:
    """What `qswin inspect --json` wrote of an engine or graph, coloured by precision."""
    parts = []
    for file, record in records.items():
        if "layers" in record and isinstance(record["layers"], list):
            found = record["layers"]
            rows = [[r["name"], r["kind"], " ".join(r["inputs"]), " ".join(r["outputs"]), r.get("ms")] for r in found]
            kinds = [" ".join(r["outputs"]).lower().split(" ")[0] for r in found]
            parts.append(f"<h3>{html.escape(file)}</h3>" + table(["layer", "kind", "inputs", "outputs", "ms"], rows, kinds))
    return "".join(parts)


def overlays(run: Path) -> str:
    """The worst pictures that `qswin evaluate --overlays` drew below the run's folder."""
    return "".join(picture(path.read_bytes(), path.stem) for path in sorted(run.glob("overlays/*.png")))


def report(run: Path) -> str:
    """The page.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing to report, or a file that cannot be read; matplotlib is missing.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    records = read_records(run)
    sections = {
        "Accuracy": accuracy(records),
        "Speed": speed(records),
        "Training": training(run),
        "Sensitivity": sensitivity(records),
        "Ranges": ranges(run),
        "Layers": layers(records),
        "Worst images": overlays(run),
    }
    found = {heading: content for heading, content in sections.items() if content}
    if not found:
        raise ValueError(f"{run}: nothing to report; calibrate, train, evaluate or bench with its files there (--json)")
    return page(f"qswin: {run.name}", found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "One self-contained HTML page of what a run's folder holds: accuracy, speed, training, sensitivity, ranges."
    )
    parser.epilog = "example:\n  qswin report runs/x"
    parser.add_argument("run", type=Path, help="the folder")
    parser.add_argument("--out", type=Path, help="default: RUN/report.html")
    parser.add_argument("--json", type=Path, help="write the page's name and size here")


def main(args: argparse.Namespace) -> None:
    out = args.out or args.run / "report.html"
    content = report(args.run)
    write_atomic(out, content.encode())
    if args.json:
        write_json(args.json, {"page": str(out), "bytes": len(content.encode())})
    logging.info("%s: %.1f MB", out, len(content) / 1e6)


if __name__ == "__main__":
    from qswin import run

    run(add_arguments, main, "trt.report")
