"""Kills commands that write something by SIGKILL at random moments, and starts them again.

    make demo                                                    (its digits, weights and graphs are what this works on)
    python -m benchmarks.kills --out docs/results/kills.json [--jobs train ...] [--kills 50]

A job is started and killed, again and again in one folder, until it has been killed that often; every file that it
leaves is read after each kill. Then it runs to its end. The result must be the one of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.demo import CONFIG, ROOT, RUN
from benchmarks.results import commit
from qswin.calib.files import read_sidecar, sidecar_path, write_json
from qswin.calib.histogram_file import load_histograms
from qswin.calib.reading import read_yaml
from qswin.calib.trt_cache.cache_file import parse_cache
from qswin.qat.checkpoint import read_description

SENSITIVITY = RUN / "sensitivity.json"  # of the demo's checkpoint, for search
MEASURED = {"images_per_second", "first_ms", "ms", "p95_ms"}  # of results: no two runs have the same
NAMES = {"command", "pictures"}  # the folder
ONCE = {"init"}  # refuses to write over what is there
Check = Callable[[Path], object]


def commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """By job: its command line, and the file it ends with."""
    data, weights = RUN / "digits", RUN / "float" / "float.safetensors"
    common = [
        "--config",
        str(CONFIG),
        f"data.root={data}",
        f"model.checkpoint={weights}",
        f"run={folder}",
        "data.workers=0",
    ]
    qat = ["train.epochs=3", "train.lr=1e-4", "train.distill_weight=0.5", "train.save_minutes=0.01"]
    images = ["--data", str(data / "train"), "--images", "64"]
    ptq, graph = str(RUN / "ptq.safetensors"), str(RUN / "fp32.onnx")
    compared = ["--model", str(RUN / "int8.onnx"), "--reference", graph, "--data", str(data / "val"), "--images", "64"]
    probe, val = ["--checkpoint", ptq, *images], ["--data", str(data / "val"), "--images", "64"]
    timed = ["--batch-sizes", "1", "--cpu-repeats", "1", "--plot", str(folder / "bench.png")]
    return {
        "init": (
            ["qswin", "init", str(weights), "--data", str(data), "--out", str(folder / "x.yaml")]
            + ["--json", str(folder / "init.json")],
            "x.yaml",
        ),
        "inspect": (["qswin", "inspect", "--model", ptq, "--json", str(folder / "inspect.json")], "inspect.json"),
        "doctor": (["qswin", "doctor", "--json", str(folder / "doctor.json")], "doctor.json"),
        "evaluate": (
            ["qswin", "evaluate", "--model", graph, *val, "--pictures", str(folder / "pictures"), "--worst", "4"]
            + ["--workers", "0", "--json", str(folder / "evaluate.json")],
            "evaluate.json",
        ),
        "bench": (
            ["qswin", "bench", "--model", graph, *timed, "--json", str(folder / "bench.json")],
            "bench.json",
        ),
        "search": (
            ["qswin", "search", *probe, "--sensitivity", str(SENSITIVITY), "--budget", "bops<=0.5"]
            + ["--recipe", str(folder / "mixed.yaml"), "--json", str(folder / "search.json")],
            "mixed.yaml",
        ),
        "build": (
            ["qswin", "build", "--onnx", str(RUN / "int8.onnx"), "--engine", str(folder / "x.engine")]
            + ["--target", "tensorrt-rtx", "--json", str(folder / "build.json")],
            "x.engine",
        ),
        "convert": (["qswin", "convert", *common, f"model.checkpoint={ptq}"], "ptq.safetensors"),
        "export": (["qswin", "export", "--checkpoint", ptq, "--onnx", str(folder / "x.onnx")], "x.onnx"),
        "compare": (["qswin", "compare", *compared, "--layers", "--json", str(folder / "c.json")], "c.json"),
        "report": (["qswin", "report", str(RUN), "--out", str(folder / "report.html")], "report.html"),
        "calibrate": (["qswin", "calibrate", *common], "ptq.safetensors"),
        "train": (["qswin", "train", *common, *qat, f"init={ptq}"], "qat.safetensors"),
        "sensitivity": (
            ["qswin", "sensitivity", *probe, "--json", str(folder / "sensitivity.json")],
            "sensitivity.json",
        ),
        "calib-cache": (
            ["qswin", "calib-cache", "--onnx", graph, *images, "--cache", str(folder / "x.cache"), "--offline"],
            "x.cache",
        ),
    }


class Job:
    """A command that runs; `log` is what it says."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float | None = None) -> None:
        """Raises TimeoutExpired when it still runs after `seconds`, SystemExit when it failed."""
        if self.process.wait(seconds):
            raise SystemExit(f"{self.log}: failed\n{self.log.read_text()}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


READERS: dict[str, Check] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".safetensors": safetensors.torch.load_file,
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".cache": lambda path: parse_cache(path.read_bytes()),
    ".npz": load_histograms,
    ".yaml": read_yaml,
    ".engine": lambda path: read_sidecar(path, "engine", (), "") if sidecar_path(path).is_file() else None,
}


def read_all(folder: Path) -> None:
    """Reads every file that is there under its own name; raises what the reader raises."""
    for path in folder.glob("[!.]*"):
        if path.suffix in READERS:
            READERS[path.suffix](path)


def same(first: Path, second: Path) -> bool:
    """Whether two results are: tensors to float32's last digits, as sums are taken in any order; others to the byte.

    The name of the folder is taken out of both.
    """
    if first.suffix == ".json":
        a, b = (steady(json.loads(path.read_text())) for path in (first, second))
        return a == b
    if first.suffix != ".safetensors":
        a, b = (path.read_bytes().replace(str(path.parent).encode(), b"") for path in (first, second))
        return a == b
    read_description(second)  # its sidecar is its own
    a, b = (safetensors.torch.load_file(path) for path in (first, second))
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def steady(value: Any) -> Any:
    """A result without what is measured, and without what names the folder."""
    if isinstance(value, list):
        return [steady(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {key: steady(entry) for key, entry in value.items() if key not in MEASURED | NAMES}


def bit_equal(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same tensors to the bit."""
    a, b = (safetensors.torch.load_file(path) for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_sensitivity() -> None:
    """Writes what `search` reads, if it is not there."""
    if not SENSITIVITY.is_file():
        command, _ = commands(SENSITIVITY.parent)["sensitivity"]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)


def torture(job: str, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills one job `kills` times."""
    whole, folder, rng = work / "whole", work / "killed", random.Random(seed)
    shutil.rmtree(work, ignore_errors=True)
    for run in (whole, folder):
        run.mkdir(parents=True)
    log, begun = work / "log", time.perf_counter()
    if job == "search":
        make_sensitivity()
    command, product = commands(whole)[job]
    Job(command, log).wait()
    seconds, killed, finished = time.perf_counter() - begun, 0, 0
    command, _ = commands(folder)[job]
    while killed < kills:
        running = Job(command, log)
        try:
            running.wait(rng.uniform(0.2, 1.0) * seconds)
            finished += 1
            assert same(whole / product, folder / product)
            shutil.rmtree(folder)
            folder.mkdir()
        except subprocess.TimeoutExpired:
            running.kill()
            killed += 1
            read_all(folder)
            if job in ONCE:
                (folder / product).unlink(missing_ok=True)
    Job(command, log).wait()
    trained = product.endswith(".safetensors")
    left = sum(path.name.startswith(".") for path in folder.iterdir())
    return {
        "job": job,
        "seconds_undisturbed": round(seconds, 1),
        "killed": killed,
        "finished_between_kills": finished,
        "same_result": same(whole / product, folder / product),
        **({"bit_equal": bit_equal(whole / product, folder / product)} if trained else {}),
        "temporary_files_left": left,
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--jobs", nargs="*", default=["calibrate", "train", "sensitivity", "calib-cache"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    for job in args.jobs:
        rows.append(torture(job, RUN.parent / "kills" / job, args.kills, args.seed))
        print(rows[-1], flush=True)
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
