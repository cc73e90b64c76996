"""Time and memory of commands on 100,000 images, beside a tenth of them, decoded by eight processes.

    make demo                                                    (its weights and graph are what this works on)
    python -m benchmarks.load --images FILE.tar --out docs/results/load.json [--jobs train-start ...]

The images, JPEGs in a tar file of CLASS/IMAGE, are linked again and again under new names, in ten folders of the demo's
classes: what they are labelled does not matter here. Memory is that of the largest process of the command, and, by the
proportional set size, that of all of them together.

calibrate: on all images. calibrate-start: on 512 of them. train-start: as far as the twentieth step, then stopped.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.demo import CONFIG, ROOT, RUN
from benchmarks.results import commit, device_name, write_rows

WORKERS = "8"
STEPS = 20
STOPPED = 130  # the exit code


def linked(source: Path, folder: Path, count: int) -> None:
    """`count` images in ten folders, called as the demo's classes are."""
    images = sorted(path for path in source.rglob("*") if path.is_file())
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for index, path in zip(range(count), itertools.cycle(images), strict=False):
        os.link(path, folder / str(index % 10) / f"{index}{path.suffix}")


def measure(command: list[str], log: Path | None = None) -> dict[str, float]:
    """Seconds, and peak megabytes, of a command; it is stopped when its log has so many lines as STEPS."""
    start, together = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-m", "qswin", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        together = max(together, sum(map(own_share, family(process.pid))))
        if log is not None and log.is_file() and log.read_text().count("\n") >= STEPS:
            process.terminate()
            ended = os.wait4(process.pid, 0)
            break
        time.sleep(0.5)
    _, status, usage = ended
    if os.waitstatus_to_exitcode(status) != (STOPPED if log else 0):
        raise SystemExit(f"{' '.join(command)}: failed; its error is above")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6),
        "all_processes_megabytes": round(together / 1e6),
    }


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def own_share(pid: int) -> float:
    """Bytes of a process, those that it shares divided by how many share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def jobs(folder: Path, count: int) -> dict[str, tuple[list[str], Path | None]]:
    """By name: a command, and the log by which it is stopped."""
    run = folder / "run"
    settings = [f"data.root={folder}", f"model.checkpoint={RUN / 'float' / 'float.safetensors'}", f"run={run}"]
    common = ["--config", str(CONFIG), *settings, f"data.workers={WORKERS}"]
    evaluated = ["--model", str(RUN / "int8.onnx"), "--data", str(folder / "train"), "--workers", WORKERS]
    trained = [f"init={RUN / 'ptq.safetensors'}", "train.log_every=1"]
    return {
        "evaluate": (["evaluate", *evaluated], None),
        "calibrate": (["calibrate", *common, f"calibration.images={count}"], None),
        "calibrate-start": (["calibrate", *common, "calibration.images=512"], None),
        "train-start": (["train", *common, *trained], run / "log.jsonl"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="a .tar of CLASS/IMAGE.JPEG")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--jobs", nargs="*", default=list(jobs(Path(), 0)))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=RUN) as source:
        with tarfile.open(args.images) as tar:
            tar.extractall(source, filter="data")
        for job, share in itertools.product(args.jobs, (0.1, 1)):
            count = int(100_000 * args.scale * share)
            with tempfile.TemporaryDirectory(dir=RUN) as folder:
                linked(Path(source), Path(folder) / "train", count)
                (Path(folder) / "val").symlink_to(Path(folder) / "train")
                row = {"job": job, "images": count, **measure(*jobs(Path(folder), count)[job])}
            rows.append({**row, "device": device_name("cpu"), "commit": commit()})
            print(row, flush=True)
            write_rows(args.out, rows)


if __name__ == "__main__":
    main()
