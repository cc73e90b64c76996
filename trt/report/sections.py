"""Everything that a run's folder holds, as the sections of a page."""

import json
import re
from pathlib import Path
from typing import Any

from qswin.calib.files import write_atomic
from qswin.calib.reading import read_json
from qswin.trt.report import plots
from qswin.trt.report.ranges import histograms, range_table, stage_ranges
from qswin.trt.report.results import read_results, result_sections, skipped
from qswin.trt.report.webpage import Part, Picture, table

Sections = dict[str, list[Part]]  # {heading: its parts}
# What comes first, in this order.
FIRST = ("Accuracy", "Verdicts", "Speed", "Training", "Sensitivity", "Ranges", "Histograms", "Layers", "Worst images")


def report(run: Path) -> Sections:
    """All that the folder holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing to report, or a file that cannot be read; matplotlib is missing.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder")
    results, stages = read_results(run), stage_ranges(run)
    sections = {
        **result_sections(results),
        "Verdicts": verdicts(run),
        "Training": training(run),
        "Ranges": range_table(stages),
        "Histograms": histograms(run, stages),
        "Worst images": worst_images(run),
    }
    found = {heading: sections[heading] for heading in dict.fromkeys((*FIRST, *sections)) if sections[heading]}
    if not set(found) - {"Skipped"}:
        old = f" ({skipped(results.old)})" if results.old else ""
        raise ValueError(f"{run}: nothing to report{old}; calibrate, train, evaluate or bench with --json files there")
    return found


def verdicts(run: Path) -> list[Part]:
    """How far each checkpoint is from the float model, from the sidecars."""
    rows = []
    for path in sorted(run.rglob("*.safetensors.json")):
        found = read_json(path)
        metrics = found.get("metrics") if found.get("kind") == "checkpoint" else None
        verdict = metrics.get("verdict") if isinstance(metrics, dict) else None
        if isinstance(verdict, dict):
            blame = ", ".join(verdict.get("blame", ()))
            shown = [verdict.get(key) for key in ("agreement", "kl", "images")]
            rows.append([path.stem, *shown, "yes" if verdict.get("good") else "no", blame])
    headings = ["checkpoint", "agreement, %", "mean KL", "images", "good", "to blame"]
    return [table(headings, rows)] if rows else []


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

        parts.append(plots.picture(plot, f"{path.relative_to(run)}: the loss", height=3))
        if epochs:
            names = list(dict.fromkeys(name for line in epochs for name in line))
            parts.append(table(names, [[line.get(name) for name in names] for line in epochs]))
    return parts


def worst_images(run: Path) -> list[Part]:
    """What `qswin evaluate --pictures` drew in the folder `pictures` of the run's."""
    return [Picture(path.read_bytes(), path.stem) for path in sorted(run.glob("pictures/*.png"))]


def save_pictures(sections: Sections, folder: Path) -> int:
    """Writes the pictures as PNGs too, named by their place and caption. Returns how many there are."""
    pictures = [part for parts in sections.values() for part in parts if isinstance(part, Picture)]
    for number, picture in enumerate(pictures, 1):
        name = re.sub(r"[^\w.]+", "-", picture.caption)[:80].strip("-")
        write_atomic(folder / f"{number:02d}-{name}.png", picture.png)
    return len(pictures)
