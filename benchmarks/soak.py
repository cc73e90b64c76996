"""Evaluation again and again in one process: does its memory grow?

    make demo                                                    (its graph is what this works on)
    python -m benchmarks.soak --images FILE.tar --minutes 15 --out docs/results/soak.json

A round evaluates 500 JPEGs with eight processes that decode, and ends with the resident memory of this process. The row
is written again every minute, so that a run that is stopped leaves what it found.
"""

import argparse
import contextlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
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


def soak(model: Path, data: Path, minutes: float) -> Iterator[tuple[float, float]]:
    """(minutes since the start, megabytes) after each round, for so many minutes."""
    start, past = time.perf_counter(), 0.0
    while past < minutes:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate_folder(model, open_predictor(model), data, EvaluationOptions(workers=8))
        past = (time.perf_counter() - start) / 60
        yield past, resident()


def summary(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The row: how long, how often, and the memory's course, by tenths of the time."""
    minutes, megabytes = zip(*found, strict=True)
    tenths = sorted({share * (len(found) - 1) // 10 for share in range(11)})
    return {
        "minutes": round(minutes[-1], 1),
        "rounds": len(found),
        "images": IMAGES * len(found),
        "megabytes": {
            "first": round(megabytes[0], 1),
            "most": round(max(megabytes), 1),
            "course": [[round(minutes[index], 1), round(megabytes[index], 1)] for index in tenths],
        },
        "device": device_name("cpu"),
        "commit": commit(),
    }


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
        found: list[tuple[float, float]] = []
        for past, megabytes in soak(RUN / "int8.onnx", Path(folder) / "val", args.minutes):
            written = int(found[-1][0]) if found else -1
            found.append((past, megabytes))
            if int(past) > written:
                write_rows(args.out, [summary(found)])
    write_rows(args.out, [summary(found)])
    print(summary(found))


if __name__ == "__main__":
    main()
