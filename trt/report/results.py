"""What the commands wrote for `--json` in a run's folder, as sections of the report."""

import html
import math
from collections.abc import Sequence
from typing import Any

from qswin.calib.reading import read_json
from qswin.trt.report import plots
from qswin.trt.report.folder import RunFolder
from qswin.trt.report.webpage import Cell, Part, Picture, table

Values = dict[str, Any]
Rows = list[Values]
SENSITIVE = 40  # groups of a sensitivity result that are drawn
# Kinds whose results are a line each: their heading, and the keys that are shown. A key that no result has is left out.
SCORES = ("acc1", "acc1_error", "acc5", "dice", "volume_dice", "volume_hd95")
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


SHAPES: dict[str, tuple[str, Values]] = {  # of kinds that list rows: under which name, and what a row holds
    "timing": ("rows", dict(zip(TIMING, (str, str, str, float, float, float), strict=True))),
    "sensitivity": ("rows", dict(zip(GROUP, (str, dict, dict), strict=True))),
    "layers": ("layers", dict(zip(LAYER, (str, str, list, list), strict=True))),
}
UNSHOWN = (  # kinds of JSON that are qswin's, and that no section shows
    *("checkpoint", "engine", "package", "bundle", "calibration cache"),
    *("checkpoint report", "calibration cache report"),
    *("quantizers", "doctor", "report", "models", "checkpoint description", "quantization"),
    *("deployment", "preprocessing"),
)
MOST_TIMED = 1000  # rows that a picture can show
Results = dict[str, dict[str, Values]]  # {kind: {file: what it holds}}


def read_results(folder: RunFolder) -> Results:
    """The results below a folder. JSON that is not a result, or not a whole one, is skipped."""
    results: Results = {}
    for path, values in folder.read("**/*.json", read_json):
        kind = values.get("kind")
        if isinstance(kind, str) and kind in (*LISTED, *SHAPES):
            if (problem := problem_of(kind, values)) is None:
                results.setdefault(kind, {})[folder.name(path)] = values
            else:
                folder.skip(path, f"{problem}; run the command again")
        elif kind is None and "command" in values:  # which every result had before it had a kind
            folder.skip(path, "made by an older qswin; run the command again")
        elif kind not in UNSHOWN:
            folder.skip(path, "not a result of qswin")
    return results


def problem_of(kind: str, values: Values) -> str | None:
    """What keeps a result from being shown as one of its kind; None where nothing does."""
    if kind not in SHAPES:
        return None
    name, shape = SHAPES[kind]
    rows = values.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and fits(row, shape) for row in rows):
        return f"its {name!r} are not rows of {', '.join(shape)}"
    if kind == "timing" and len(rows) > MOST_TIMED:
        return f"it has more than {MOST_TIMED} rows"
    metrics = [row[side] for row in rows for side in GROUP[1:]] if kind == "sensitivity" else []
    whole = [values.get(key, {}) for key in ("all", "float")] if kind == "sensitivity" else []
    if not all("kl" in found and is_numbers(found) for found in metrics) or not all(map(is_numbers, whole)):
        return "its metrics are not numbers"
    return None


def fits(row: Values, shape: Values) -> bool:
    """Whether a row has values of these types; float stands for a finite number, list for one of texts."""
    for key, kind in shape.items():
        value: Any = row.get(key)
        if kind is float and not (is_number(value) and math.isfinite(value)):
            return False
        if kind is not float and not isinstance(value, kind):
            return False
        if kind is list and not all(isinstance(entry, str) for entry in value):
            return False
    return row.get("ms") is None or is_number(row["ms"])


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def is_numbers(values: Any) -> bool:
    """Whether a value of JSON is an object of numbers."""
    return isinstance(values, dict) and all(map(is_number, values.values()))


def result_sections(results: Results) -> dict[str, list[Part]]:
    """{heading: its parts} of the results; one without parts has nothing to show. ValueError: no matplotlib."""
    return {
        **{heading: listed(results.get(kind, {}), keys) for kind, (heading, keys) in LISTED.items()},
        "Speed": speed(timing_rows(results)),
        "Sensitivity": sensitivity(results.get("sensitivity", {})),
        "Layers": layers(results.get("layers", {})),
    }


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


def timing_rows(results: Results) -> Rows:
    """What `qswin bench` measured, the rows of all files."""
    return [row for values in results.get("timing", {}).values() for row in values["rows"]]


def speed(rows: Rows) -> list[Part]:
    """All timings in one table and one picture."""
    if not rows:
        return []
    timed = table(list(map(heading, TIMING)), [[row[key] for key in TIMING] for row in rows])
    return [timed, plots.picture(lambda axes: plots.throughput(axes, rows), "images/s over the batch")]


def sensitivity(results: dict[str, Values]) -> list[Part]:
    """What `qswin sensitivity` measured: a picture and a table for each file, the groups that cost most first."""
    parts: list[Part] = []
    for file, values in results.items():
        if rows := values["rows"]:
            ranked = sorted(rows, key=lambda row: -row["alone"]["kl"])
            whole, none = (values.get(name, {}) for name in ("all", "float"))
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
    for file, values in results.items():
        found = values["layers"]
        rows = [[r["name"], r["kind"], " ".join(r["inputs"]), " ".join(r["outputs"]), r.get("ms")] for r in found]
        precisions = [" ".join(r["outputs"]).lower().split(" ")[0] for r in found]
        listing = table(["layer", "kind", "inputs", "outputs", "ms"], rows, precisions)
        parts.append(f"<h3>{html.escape(file)}</h3>" + listing)
    return parts
