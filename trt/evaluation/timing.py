"""Latency and throughput side by side: engines by CUDA events, ONNX files in ONNX Runtime. The library of `qswin bench`.

Images are noise: blank ones would let a GPU that is held to a power limit run faster than it does with photographs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from qswin.calib.data.images import noise_images
from qswin.calib.files import write_json
from qswin.trt.engines.cuda import Stopwatch, captured, find_gpu
from qswin.trt.engines.engine import SUFFIXES, Engine
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from qswin.trt.report import plots

Row = dict[str, Any]
Timer = Callable[[], float]  # runs once and gives milliseconds


def measure(timer: Timer, warmup: int, repeats: int) -> Row:
    """Times the first run, then `warmup` runs that do not count, then `repeats`.

    Returns:
        {"first_ms"} of the first run, {"ms"} the median of the repeats, {"p95_ms"} their 95th percentile.
    """
    first = timer()
    for _ in range(warmup):
        timer()
    times = [timer() for _ in range(repeats)]
    return {
        "first_ms": round(first, 4),
        "ms": round(statistics.median(times), 4),
        "p95_ms": round(float(np.percentile(times, 95)), 4),
    }


def rates(row: Row, batch: int) -> Row:
    """A measured row with its batch and images/s."""
    return {**row, "batch": batch, "images_per_second": round(1000 * batch / row["ms"], 1)}


def wall_clock(work: Callable[[], object]) -> Timer:
    """Times work that is done when it returns."""

    def timer() -> float:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)

    return timer


def bench_engine(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """An engine with its input on the GPU, by CUDA events; also as a CUDA graph where `args.cuda_graph` asks for it."""
    engine, gpu = Engine(path), find_gpu()
    assert gpu is not None
    watch = Stopwatch(engine.stream)
    row = {"model": path.name, "backend": engine.backend, "precision": engine.precision, "device": gpu.name}
    for batch in batches:
        if not engine.smallest <= batch <= engine.largest:
            logging.warning("%s: skips batch %d, outside its %d to %d", path, batch, engine.smallest, engine.largest)
            continue
        engine.load(noise_images(batch, engine.preprocessing))
        yield row | rates(measure(lambda: watch.time(engine.enqueue), args.warmup, args.repeats), batch)
        if args.cuda_graph:
            with captured(engine.enqueue, engine.stream) as launch:
                measured = measure(lambda: watch.time(launch), args.warmup, args.repeats)  # noqa: B023
            yield row | {"backend": f"{engine.backend}, CUDA graph"} | rates(measured, batch)


def bench_onnx(path: Path, batches: list[int], args: argparse.Namespace) -> Iterator[Row]:
    """An ONNX file on the CPU, by the wall clock."""
    predictor = OnnxRuntimePredictor(path, args.threads)
    row = {
        "model": path.name,
        "backend": "onnxruntime",
        "precision": predictor.precision,
        "device": f"CPU, {args.threads or 'all'} threads",
    }
    for batch in batches:
        if predictor.batch_size not in (None, batch):
            logging.warning("%s: skips batch %d, its batch is fixed to %d", path, batch, predictor.batch_size)
            continue
        images = noise_images(batch, predictor.preprocessing)
        timer = wall_clock(lambda: predictor(images))  # noqa: B023
        yield row | rates(measure(timer, min(args.warmup, 2), min(args.repeats, args.cpu_repeats)), batch)


def table(rows: list[Row]) -> str:
    """One line a model and batch, with the speed-up over ONNX Runtime and over eager PyTorch of the same batch."""
    lines = [
        f"{'model':<24} {'backend':<28} {'precision':<9} {'batch':>5} {'ms':>9} {'images/s':>9} {'x ORT':>7} {'x torch':>7}"
    ]
    for row in rows:
        peers = [
            speed_up(row, next((r for r in rows if r["batch"] == row["batch"] and r["backend"].startswith(name)), None))
            for name in ("onnxruntime", "torch")
        ]
        lines.append(
            f"{row['model'][-24:]:<24} {row['backend'][:28]:<28} {row['precision']:<9} {row['batch']:5d} {row['ms']:9.3f}"
            f" {row['images_per_second']:9.1f} {peers[0]:>7} {peers[1]:>7}"
        )
    return "\n".join(lines)


def speed_up(row: Row, peer: Row | None) -> str:
    """How many times as fast as the peer, "-" without one."""
    return "-" if peer is None else f"{peer['ms'] / row['ms']:.2f}"


def plot(rows: list[Row], path: Path) -> None:
    """Images/s over the batch size, a line for each model and backend. Raises ValueError where matplotlib is missing."""
    plots.save(lambda axes: plots.throughput(axes, rows), path, height=5)


Bench = Callable[[Path, list[int], argparse.Namespace], Iterator[Row]]
BENCHES: dict[str, Bench] = {".onnx": bench_onnx, **dict.fromkeys(SUFFIXES, bench_engine)}


def bench_models(args: argparse.Namespace, benches: dict[str, Bench]) -> list[Row]:
    """Measures every model at every batch, prints the table, writes JSON and the plot.

    Raises:
        ValueError: a model is of no kind that can be measured, or nothing could be measured.
    """
    try:
        batches = [int(batch) for batch in args.batch.split(",")]
    except ValueError as error:
        raise ValueError(f"--batch {args.batch}: give batch sizes, for instance 1,16,64") from error
    unknown = [path for path in args.model if path.suffix not in benches]
    if unknown:
        raise ValueError(f"{unknown[0]}: cannot be measured here; give {', '.join(benches)}")
    rows: list[Row] = []
    for path in tqdm(args.model, "bench", disable=not sys.stderr.isatty()):
        rows += benches[path.suffix](path, batches, args)
    if not rows:
        raise ValueError(f"no model takes a batch of {args.batch}")
    print(table(rows))
    if args.json:
        write_json(args.json, {"rows": rows, "command": sys.argv})
    if args.plot:
        plot(rows, args.plot)
    return rows
