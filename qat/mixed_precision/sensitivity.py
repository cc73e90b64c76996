"""How much each site costs in accuracy: quantized alone, and all but it."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from qswin.calib.files import remove_temporaries, write_result
from qswin.calib.lock import lock_file
from qswin.calib.messages import text_of
from qswin.calib.reading import read_json
from qswin.calib.validation import validate
from qswin.qat.distributed import process_group
from qswin.qat.mixed_precision.probe import (
    Groups,
    Probe,
    ProbeImages,
    draw_probe,
    group_quantizers,
    open_probe,
    probe_facts,
)
from qswin.qat.plan import plan_text
from qswin.qat.quant.quantizers import quantizers
from qswin.trt.report import plots

KIND = "sensitivity"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A group of sites in a report: its metrics when it alone is quantized, and when all but it are."""

    name: str
    sites: list[str]
    alone: dict[str, float]
    without: dict[str, float]

    def __post_init__(self) -> None:
        if "kl" not in self.alone or "kl" not in self.without:
            raise ValueError("its metrics lack 'kl'")


def run_sensitivity(checkpoint: Path, images: ProbeImages, by: str, path: Path, device: str = "auto") -> dict[str, Any]:
    """Measures every group of a checkpoint; goes on from what an interrupted run of the same job has left.

    Args:
        by: "site" or "layer"; see `group_quantizers`.
        path: the JSON file, written after each group.

    Returns:
        {"job", "float", "all", "rows"}: the metrics without quantizers, with all of them, and a row for each group.

    Raises:
        ValueError: the file is another job's, or another process is at work on it; or see `open_probe`.
    """
    with process_group(device) as ranks, one_job(path, ranks.main):
        probe = open_probe(checkpoint, images, str(ranks.device))
        job = {"checkpoint": probe.sha256, "images": images.images, "seed": images.seed, "by": by}
        report = start_report(path, {**job, "data": str(images.data)})
        if "all" not in report:
            report |= {"float": probe.measure([]), "all": probe.measure(list(quantizers(probe.model)))}
        groups = group_quantizers(probe.model, by)
        try:
            measure_groups(probe, groups, report, path)
        except KeyboardInterrupt as error:
            kept = f"{path} holds {len(report['rows'])} of {len(groups)} groups"
            raise KeyboardInterrupt(f"{kept}; the same command goes on from there") from error
    logging.info("%s: %d rows", path, len(report["rows"]))
    return report


def plan_sensitivity(checkpoint: Path, images: ProbeImages, by: str, path: Path, device: str) -> str:
    """What `run_sensitivity` would do. All that it reads is checked, and nothing is written. Raises as it does."""
    with process_group(device) as ranks:
        facts = probe_facts(draw_probe(checkpoint, images), checkpoint, images, by, ranks.device)
    if path.is_file():
        facts["state"] = f"{path} has {len(read_report(path)['rows'])} groups; those of the same job are kept"
    return plan_text("sensitivity", facts, [path])


@contextlib.contextmanager
def one_job(path: Path, main: bool) -> Iterator[None]:
    """Holds a report for one job, and removes what killed ones left half written. Raises as `lock_file` does."""
    with lock_file(path, "--json") if main else contextlib.nullcontext(False) as locked:
        if locked:
            remove_temporaries(path.parent, [path.name])
        yield


def start_report(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """An empty report, or the one that an interrupted run of the same job left. Raises ValueError for another job's."""
    if not path.is_file():
        return {"job": job, "rows": []}
    report = read_report(path)
    for key, value in job.items():
        if report["job"].get(key) != value:
            was = report["job"].get(key)
            raise ValueError(f"{path}: of another job ({key} was {was}, now {value}); choose another --json")
    return report


def read_report(path: Path) -> dict[str, Any]:
    """What `run_sensitivity` wrote. Raises FileNotFoundError, and ValueError for a file of another kind."""
    report = read_json(path)
    if (
        report.get("kind") != KIND
        or not isinstance(report.get("job"), dict)
        or not isinstance(report.get("rows"), list)
    ):
        raise ValueError(f"{path}: not a sensitivity report; choose another name, or run qswin sensitivity again")
    validate(report["rows"], list[_Row], f"{path}: rows", remedy="run qswin sensitivity again")
    return {key: report[key] for key in ("job", "float", "all", "rows") if key in report}


def measure_groups(probe: Probe, groups: Groups, report: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Fills `report["rows"]` with a row per group, most harmful first, and saves it after each. Rows there are kept."""
    everything = list(quantizers(probe.model))
    done = {row["name"] for row in report["rows"]}
    for name in tqdm(groups, "sensitivity", disable=not sys.stderr.isatty()):
        if name in done:
            continue
        others = [quantizer for quantizer in everything if quantizer not in groups[name]]
        sites = sorted({quantizer.recipe_site for quantizer in groups[name]})
        row = {"name": name, "sites": sites, "alone": probe.measure(groups[name]), "without": probe.measure(others)}
        report["rows"] = sorted([*report["rows"], row], key=lambda row: -row["alone"]["kl"])
        write_result(path, KIND, report)
    return report["rows"]


def table(report: dict[str, Any], rows: int) -> str:
    """The most sensitive groups, and the whole model for comparison."""
    lines = [f"{'':<40} {'alone: KL':>12} {'':>8} {'all but: KL':>12}"]
    values = [(row["name"], row["alone"], row["without"]) for row in report["rows"][:rows]]
    for name, alone, without in [*values, ("everything", report["all"], report["float"])]:
        lines.append(f"{name:<40} {_cells(alone)} {_cells(without)}")
    return text_of(lines)


def _cells(metrics: dict[str, float]) -> str:
    """The KL and the main metric, which is missing where there were no labels."""
    main = next((f"{value:8.4g}" for key, value in metrics.items() if key != "kl"), " " * 8)
    return f"{metrics['kl']:12.4g} {main}"


def plot(report: dict[str, Any], path: Path, rows: int) -> None:
    """A bar for each of the most sensitive groups. Raises ValueError where matplotlib is missing."""
    shown = report["rows"][:rows]
    plots.save(lambda axes: plots.ranking(axes, shown), path, height=1 + 0.22 * len(shown))
