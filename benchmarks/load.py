"""Peak memory of `qswin evaluate` and `qswin calibrate` on 100,000 images, beside a tenth of them.

    make demo                                                    (its weights and graph are what this works on)
    python -m benchmarks.load --images FILE.tar --out docs/results/load.json

The images, JPEGs in a tar file of CLASS/IMAGE, are linked again and again under new names, in ten folders of the demo's
classes: what they are labelled does not matter here. Memory is that of the largest process of the command.
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


def linked(source: Path, folder: Path, count: int) -> None:
    """`count` images in ten folders, called as the demo's classes are."""
    images = sorted(path for path in source.rglob("*") if path.is_file())
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for index, path in zip(range(count), itertools.cycle(images), strict=False):
        os.link(path, folder / str(index % 10) / f"{index}{path.suffix}")


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, and peak resident megabytes, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qswin", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed; its error is above")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6)}


def jobs(data: Path, count: int) -> dict[str, list[str]]:
    settings = [f"data.root={data}", f"model.checkpoint={RUN / 'float' / 'float.safetensors'}", f"run={data / 'run'}"]
    return {
        "evaluate": [
            "evaluate",
            "--model",
            str(RUN / "int8.onnx"),
            "--data",
            str(data / "train"),
            "--workers",
            WORKERS,
        ],
        "calibrate": [
            "calibrate",
            "--config",
            str(CONFIG),
            *settings,
            f"calibration.images={count}",
            f"data.workers={WORKERS}",
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="a .tar of CLASS/IMAGE.JPEG")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=RUN) as source:
        with tarfile.open(args.images) as tar:
            tar.extractall(source, filter="data")
        for job, share in itertools.product(("evaluate", "calibrate"), (0.1, 1)):
            count = int(100_000 * args.scale * share)
            with tempfile.TemporaryDirectory(dir=RUN) as folder:
                linked(Path(source), Path(folder) / "train", count)
                (Path(folder) / "val").symlink_to(Path(folder) / "train")
                row = {"job": job, "images": count, **measure(jobs(Path(folder), count)[job])}
            rows.append({**row, "device": device_name("cpu"), "commit": commit()})
            print(row, flush=True)
            write_rows(args.out, rows)


if __name__ == "__main__":
    main()
