"""Everything that a run's folder holds, as the sections of a page."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from qswin.calib.data.images import CAPTION, naming_unreadable
from qswin.calib.files import write_atomic
from qswin.calib.reading import JSON_BYTES, parse_json, read_json, read_regular
from qswin.trt.report import plots
from qswin.trt.report.folder import LARGEST, RunFolder
from qswin.trt.report.ranges import histograms, range_table, stage_ranges
from qswin.trt.report.results import cell, is_numbers, read_results, result_sections
from qswin.trt.report.summary import summary
from qswin.trt.report.webpage import Gallery, Part, Picture, page, table

Sections = dict[str, list[Part]]  # {heading: its parts}
MOST_PICTURES = 200
# What comes first, in this order.
FIRST = (
    "Summary",
    "Accuracy",
    "Verdicts",
    "Speed",
    "Training",
    "Sensitivity",
    "Ranges",
    "Histograms",
    "Layers",
    "Worst images",
)


def report(run: Path) -> Sections:
    """All that the folder holds; what cannot be shown is listed under "Skipped".

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing to report; matplotlib is missing.
    """
    folder = RunFolder(run)
    stages, results, told = stage_ranges(folder), read_results(folder), read_verdicts(folder)
    sections = {
        "Summary": summary(results, told),
        **result_sections(results),
        "Verdicts": verdicts(told),
        "Training": training(folder),
        "Ranges": range_table(stages),
        "Histograms": histograms(folder, stages),
        "Worst images": worst_images(folder),
    }
    found = {heading: sections[heading] for heading in dict.fromkeys((*FIRST, *sections)) if sections[heading]}
    if not found:
        first = "; ".join(f"{file}: {reason}" for file, reason in list(folder.skipped.items())[:3])
        skipped = f" ({first})" if first else ""
        what = "calibrate, train, evaluate or bench with --json files there"
        raise ValueError(f"{run}: nothing to report{skipped}; {what}")
    return {**found, "Skipped": [table(["file", "reason"], folder.skipped.items())]} if folder.skipped else found


def read_verdicts(folder: RunFolder) -> list[tuple[str, dict[str, Any]]]:
    """Each checkpoint's name and verdict, from the sidecars."""
    found = []
    for path, sidecar in folder.read("**/*.safetensors.json", read_json):
        metrics = sidecar.get("metrics") if sidecar.get("kind") == "checkpoint" else None
        verdict = metrics.get("verdict") if isinstance(metrics, dict) else None
        if isinstance(verdict, dict):
            found.append((path.stem, verdict))
    return found


def verdicts(told: list[tuple[str, dict[str, Any]]]) -> list[Part]:
    """How far each checkpoint is from the float model."""
    rows = []
    for name, verdict in told:
        shown = [cell(verdict.get(key)) for key in ("agreement", "kl", "images")]
        rows.append([name, *shown, "yes" if verdict.get("good") else "no", cell(verdict.get("blame", ""))])
    headings = ["checkpoint", "agreement, %", "mean KL", "images", "good", "to blame"]
    return [table(headings, rows)] if rows else []


def training(folder: RunFolder) -> list[Part]:
    """The loss of each step and the metric of each epoch, from every log.jsonl."""
    parts: list[Part] = []
    for path, lines in folder.read("**/log.jsonl", read_log):
        steps = [line for line in lines if "loss" in line]
        epochs = [line for line in lines if "epoch" in line]
        if not steps:
            continue

        def plot(axes: Any, steps: list[dict[str, Any]] = steps) -> None:
            axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=1)
            axes.set(xlabel="step", ylabel="loss")

        parts.append(plots.picture(plot, f"{folder.name(path)}: the loss", height=3))
        if epochs:
            names = list(dict.fromkeys(name for line in epochs for name in line))
            parts.append(table(names, [[line.get(name) for name in names] for line in epochs]))
    return parts


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole, each an object of numbers. Raises ValueError for any other file."""
    text = read_regular(path, JSON_BYTES).decode(errors="replace")
    lines = [parse_json(line, str(path)) for line in text.splitlines() if line.endswith("}")]
    if not all(is_numbers(line) and "step" in line for line in lines):
        raise ValueError(f"{path}: not the log of a training")
    return lines


def worst_images(folder: RunFolder) -> list[Part]:
    """What `qswin evaluate --pictures` drew in the folder `pictures` of the run's."""
    found: list[Picture] = []
    for path, picture in folder.read("pictures/*.png", read_picture):
        if len(found) == MOST_PICTURES:
            folder.skip(path, f"the page shows {MOST_PICTURES} pictures")
        else:
            found.append(picture)
    return [Gallery(found)] if found else []


def read_picture(path: Path) -> Picture:
    """A PNG with its description as the caption, or else its name. Raises ValueError for any other file."""
    data = read_regular(path, LARGEST[".png"])
    try:
        with naming_unreadable(path), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return Picture(data, str(image.info.get(CAPTION, path.stem)))
    except ValueError as error:
        raise ValueError(f"{path}: not a PNG, or cut off") from error


def write_report(folder: Path, out: Path) -> tuple[int, int]:
    """Writes a run's page, and its pictures as PNGs too, in a folder named after it.

    Returns:
        The page's bytes, and how many pictures there are.

    Raises:
        FileNotFoundError, ValueError: as `report` does.
        OSError: it cannot be written.
    """
    sections = report(folder)
    content = page(f"qswin: {folder.resolve().name}", sections).encode(errors="backslashreplace")
    write_atomic(out, content)
    return len(content), save_pictures(sections, out.with_name(f"{out.stem}-pictures"))


def save_pictures(sections: Sections, folder: Path) -> int:
    """Writes the pictures as PNGs too, named by their place and caption. Returns how many there are."""
    pictures = list(pictures_of(part for parts in sections.values() for part in parts))
    digits = max(2, len(str(len(pictures))))  # so that the names sort as the page does
    for number, picture in enumerate(pictures, 1):
        name = re.sub(r"[^\w.]+", "-", picture.caption)[:80].strip("-")
        write_atomic(folder / f"{number:0{digits}d}-{name}.png", picture.png)
    return len(pictures)


def pictures_of(parts: Iterable[Part]) -> Iterator[Picture]:
    """The pictures, in order, those of galleries too."""
    for part in parts:
        if isinstance(part, Gallery):
            yield from part.pictures
        elif isinstance(part, Picture):
            yield part
