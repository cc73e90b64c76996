"""A run's figures, of the files that are packaged: as its JSON results have them, with the result's name."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qswin.trt.report.folder import RunFolder
from qswin.trt.report.results import read_results, timing_rows

ACCURACY = ("model", "backend", "precision", "acc1", "acc1_error", "acc5", "images")
SPEED = ("model", "backend", "device", "precision", "batch", "ms", "images_per_second")
ERRORS = ("model", "reference", "max_abs", "mean_abs", "top1_agreement")
FILES = ("model", "reference")  # keys that hold a file's path
DIGITS = {"acc1": 2, "acc1_error": 2, "acc5": 2}


def figures(run: Path, names: Collection[str]) -> str:
    """Markdown tables of what was measured of some files of a run; a sentence where nothing was."""
    results = read_results(RunFolder(run))
    found = {
        "Accuracy": (ACCURACY, list(results.get("evaluation", {}).values())),
        "Speed": (SPEED, timing_rows(results)),
        "Differences": (ERRORS, list(results.get("comparison", {}).values())),
    }
    parts = []
    for heading, (keys, rows) in found.items():
        if own := [row for row in rows if Path(str(row.get("model"))).name in names]:
            parts.append(f"### {heading}\n\n{markdown_table(keys, own)}\n")
    nothing = "The run holds no results of these files: `qswin evaluate` and `qswin bench` with `--json` make some.\n"
    return "\n".join(parts) or nothing


def markdown_table(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row. A key that no row has is left out."""
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    heading = [key.replace("images_per_second", "images/s").replace("_", " ") for key in shown]
    lines = [[cell(key, row.get(key)) for key in shown] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(shown), *lines))


def cell(key: str, value: Any) -> str:
    """A value of JSON as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DIGITS[key]}f}" if key in DIGITS else f"{value:.4g}"
    text = Path(str(value)).name if key in FILES else str(value)
    return " ".join(text.split()).replace("|", "\\|")
