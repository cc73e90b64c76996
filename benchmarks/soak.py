"""Evaluation again and again in one process: does its memory grow?

    make demo                                                    (its graph is what this works on)
    python -m benchmarks.soak --images FILE.tar --minutes 15 --out docs/results/soak.json

A round evaluates 500 JPEGs with eight processes that decode, and ends with the resident memory of this process.
"""

import argparse
import contextlib
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.demo import RUN
from benchmarks.load import linked
from benchmarks.results import commit, device_name, write_rows
from qswin.qat.backends.registry import open_predictor
from qswin.trt.evaluation.evaluate import EvaluationOptions, evaluate_folder

IMAGES = 500


def resident() -> float:
    """Megabytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(model: Path, data: Path, minutes: float) -> list[float]:
    """Megabytes after each round, for so many minutes."""
    start, found = time.perf_counter(), []
    while time.perf_counter() - start < 60 * minutes:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate_folder(model, open_predictor(model), data, EvaluationOptions(workers=8))
        found.append(round(resident(), 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="a .tar of CLASS/IMAGE.JPEG")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=RUN) as folder:
        with tarfile.open(args.images) as tar:
            tar.extractall(Path(folder) / "source", filter="data")
        linked(Path(folder) / "source", Path(folder) / "val", IMAGES)
        found = soak(RUN / "int8.onnx", Path(folder) / "val", args.minutes)
    row: dict[str, Any] = {
        "minutes": args.minutes,
        "rounds": len(found),
        "images": IMAGES * len(found),
        "megabytes": {"first": found[0], "tenth": found[min(9, len(found) - 1)], "last": found[-1], "most": max(found)},
        "device": device_name("cpu"),
        "commit": commit(),
    }
    print(row)
    write_rows(args.out, [row])


if __name__ == "__main__":
    main()
