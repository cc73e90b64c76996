"""What the commands wrote for `--json` in a run's folder, as sections of the report."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qswin.trt.report import plots
from qswin.trt.report.webpage import Cell, Part, Picture, table

Values = dict[str, Any]
Rows = list[Values]
SENSITIVE = 40  # groups of a sensitivity result that are drawn
# Kinds whose results are a line each: their heading, and the keys that are shown. A key that no result has is left out.
SCORES = ("acc1", "acc5", "dice", "volume_dice", "volume_hd95")
LISTED = {
    "evaluation": ("Accuracy", ("backend", "precision", *SCORES, "images", "images_per_second")),
    "comparison": (
        "Comparisons",
        ("model", "reference", "max_abs", "mean_abs", "mean_rel", "top1_agreement", "parting"),
    ),
    "search": ("Mixed precision", ("recipe", "budget", "in_float", "share_of_bit_operations")),
    "export": ("Exports", ("onnx", "precision", "opset", "nodes", "qdq_nodes", "bytes")),
    "build": ("Builds", ("target", "version", "engine_precision", "gpu", "capability", "profile", "seconds")),
}
TIMING = ("model", "backend", "precision", "batch", "ms", "images_per_second")
LAYER = ("name", "kind", "inputs", "outputs")
GROUP = ("name", "alone", "without")


class Results(NamedTuple):
    """The results of a folder."""

    by_kind: dict[str, dict[str, Values]]  # {kind: {file: what it holds}}
    old: list[str]  # files of qswin before 0.2, whose results have no kind

    def of(self, kind: str) -> dict[str, Values]:
        return self.by_kind.get(kind, {})


def read_results(run: Path) -> Results:
    """The results below a folder. JSON of other programs has no kind, and is passed over.

    Raises:
        ValueError: a file is not JSON, or is cut off.
    """
    by_kind: dict[str, dict[str, Values]] = {}
    old = []
    for path in sorted(run.rglob("*.json")):
        try:
            values = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON, or cut off; delete it, or make it again") from error
        file = str(path.relative_to(run))
        if isinstance(values, dict) and isinstance(values.get("kind"), str):
            by_kind.setdefault(values["kind"], {})[file] = values
        elif isinstance(values, dict) and "command" in values:  # which every result had before it had a kind
            old.append(file)
    return Results(by_kind, old)


def result_sections(results: Results) -> dict[str, list[Part]]:
    """{heading: its parts} of the results; one without parts has nothing to show.

    Raises:
        ValueError: a result lacks what its kind has; matplotlib is missing.
    """
    return {
        **{heading: listed(results.of(kind), keys) for kind, (heading, keys) in LISTED.items()},
        "Speed": speed(results.of("timing")),
        "Sensitivity": sensitivity(results.of("sensitivity")),
        "Layers": layers(results.of("layers")),
        "Skipped": [f"<p>{html.escape(skipped(results.old))}</p>"] if results.old else [],
    }


def skipped(files: Sequence[str]) -> str:
    """A sentence on the results that have no kind."""
    return f"{', '.join(files)}: made by an older qswin; run the command again"


def listed(results: dict[str, Values], keys: Sequence[str]) -> list[Part]:
    """A table with a line for each result."""
    shown = [key for key in keys if any(key in values for values in results.values())]
    rows = [[file, *(cell(values.get(key)) for key in shown)] for file, values in results.items()]
    return [table(["file", *map(heading, shown)], rows)] if rows else []


def heading(key: str) -> str:
    return key.replace("images_per_second", "images/s").replace("_", " ")


def cell(value: Any) -> Cell:
    """A value of JSON as a table shows it."""
    if value is None or isinstance(value, str | int | float):
        return value
    return ", ".join(map(str, value))


def rows_of(results: dict[str, Values], name: str, keys: Sequence[str]) -> dict[str, Rows]:
    """{file: the rows that a result lists under a name}.

    Raises:
        ValueError: there is no such list, or a row lacks one of the keys.
    """
    found: dict[str, Rows] = {}
    for file, values in results.items():
        rows = values.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
            raise ValueError(f"{file}: its {name!r} are not rows of {', '.join(keys)}; run the command again")
        found[file] = rows
    return found


def speed(results: dict[str, Values]) -> list[Part]:
    """What `qswin bench` measured, all of it in one table and one picture."""
    rows = [row for rows in rows_of(results, "rows", TIMING).values() for row in rows]
    if not rows:
        return []
    timed = table(list(map(heading, TIMING)), [[row[key] for key in TIMING] for row in rows])
    return [timed, plots.picture(lambda axes: plots.throughput(axes, rows), "images/s over the batch")]


def sensitivity(results: dict[str, Values]) -> list[Part]:
    """What `qswin sensitivity` measured: a picture and a table for each file, the groups that cost most first."""
    parts: list[Part] = []
    for file, rows in rows_of(results, "rows", GROUP).items():
        if rows:
            ranked = sorted(rows, key=lambda row: -row["alone"]["kl"])
            whole, none = (results[file].get(name, {}) for name in ("all", "float"))
            everything = {"name": "everything", "alone": whole, "without": none}
            parts += [ranking(file, ranked[:SENSITIVE]), costs([*ranked, everything])]
    return parts


def ranking(file: str, rows: Rows) -> Picture:
    """A bar for each group."""
    height = 1 + 0.22 * len(rows)
    return plots.picture(lambda axes: plots.ranking(axes, rows), f"{file}: the most sensitive", height=height)


def costs(rows: Rows) -> str:
    """A table of each metric with a group quantized alone, and with all but it."""
    columns = [(side, metric) for side in ("alone", "without") for metric in rows[0]["alone"]]
    headings = [f"{'alone' if side == 'alone' else 'all but it'}: {metric}" for side, metric in columns]
    values = [[row["name"], *(row[side].get(metric) for side, metric in columns)] for row in rows]
    return table(["quantized", *headings], values)


def layers(results: dict[str, Values]) -> list[Part]:
    """What `qswin inspect` listed of engines and graphs, a table for each, coloured by precision."""
    parts: list[Part] = []
    for file, found in rows_of(results, "layers", LAYER).items():
        rows = [[r["name"], r["kind"], " ".join(r["inputs"]), " ".join(r["outputs"]), r.get("ms")] for r in found]
        precisions = [" ".join(r["outputs"]).lower().split(" ")[0] for r in found]
        listing = table(["layer", "kind", "inputs", "outputs", "ms"], rows, precisions)
        parts.append(f"<h3>{html.escape(file)}</h3>" + listing)
    return parts
