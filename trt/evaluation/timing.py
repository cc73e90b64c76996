"""Latency and throughput of models side by side: one loop over batch sizes for whatever can be timed.

Images are noise: blank ones would let a GPU that is held to a power limit run faster than it does with photographs.
"""

import dataclasses
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from qswin.calib.data.batches import MOST_IMAGES
from qswin.calib.data.images import Preprocessing, noise_images
from qswin.calib.messages import text_of
from qswin.calib.validation import shown
from qswin.trt.report import plots

Row = dict[str, Any]
Timer = Callable[[], float]  # runs once and gives milliseconds
CUDA_GRAPH = ", CUDA graph"  # of a backend's name


@dataclasses.dataclass(frozen=True)
class TimingOptions:
    """How models are timed.

    Attributes:
        warmup: runs that do not count, after the first, on a GPU; a CPU needs fewer.
        repeats: runs that count.
        cpu_repeats: runs that count at most, on a CPU.
        cuda_graph: time engines and packages as CUDA graphs too.
        compile: time checkpoints under torch.compile too.
    """

    warmup: int = 20
    repeats: int = 100
    cpu_repeats: int = 5
    cuda_graph: bool = False
    compile: bool = False


class Subject(ABC):
    """A model in one form that is timed.

    Attributes:
        row: what is said of it in each row: model, backend, precision and device.
        preprocessing: of its images.
        smallest, largest: the batches that it takes; None for any.
        batch_sizes: those that it takes alone; None for all of these.
        cpu_warmup: warm-up runs at most, where it runs on the CPU; None on a GPU.
    """

    row: Row
    preprocessing: Preprocessing
    smallest: int = 1
    largest: int | None = None
    batch_sizes: Sequence[int] | None = None
    cpu_warmup: int | None = None

    @abstractmethod
    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        """What times a batch (N, 3, H, W) float32, and what that adds to the backend's name.

        A timer is valid until the next one is asked for.

        Args:
            cuda_graph: also as a CUDA graph, of those that can be one.
        """

    def refusal(self, batch: int) -> str | None:
        """Why it does not take a batch; None where it does."""
        if self.batch_sizes is not None:
            return None if batch in self.batch_sizes else f"not among its {', '.join(map(str, self.batch_sizes))}"
        if batch < self.smallest or (self.largest is not None and batch > self.largest):
            return f"outside its {self.smallest} to {self.largest}"
        return None

    def counts(self, options: TimingOptions) -> tuple[int, int]:
        """How many runs warm up, and how many count."""
        if self.cpu_warmup is None:
            return options.warmup, options.repeats
        return min(options.warmup, self.cpu_warmup), min(options.repeats, options.cpu_repeats)


def time_batches(subject: Subject, batch_sizes: Sequence[int], options: TimingOptions) -> Iterator[Row]:
    """A row for each batch that the subject takes, and each way that it runs one; others are skipped with a warning."""
    for batch in batch_sizes:
        if refusal := subject.refusal(batch):
            logging.warning("%s: skips batch %d, %s", subject.row["model"], batch, refusal)
            continue
        for suffix, timer in subject.timers(noise_images(batch, subject.preprocessing), options.cuda_graph):
            measured = rates(measure(timer, *subject.counts(options)), batch)
            yield {**subject.row, "backend": subject.row["backend"] + suffix, **measured}


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


def table(rows: list[Row]) -> str:
    """One line a model and batch, with the speed-up over ONNX Runtime and over eager PyTorch of the same batch."""
    lines = [
        f"{'model':<24} {'backend':<28} {'precision':<9} {'batch':>5} {'ms':>9}"
        f" {'images/s':>9} {'x ORT':>7} {'x torch':>7}"
    ]
    for row in rows:
        peers = [
            speed_up(row, next((r for r in rows if r["batch"] == row["batch"] and r["backend"].startswith(name)), None))
            for name in ("onnxruntime", "torch")
        ]
        lines.append(
            f"{row['model'][-24:]:<24} {row['backend'][:28]:<28} {row['precision']:<9} {row['batch']:5d}"
            f" {row['ms']:9.3f} {row['images_per_second']:9.1f} {peers[0]:>7} {peers[1]:>7}"
        )
    return text_of(lines)


def speed_up(row: Row, peer: Row | None) -> str:
    """How many times as fast as the peer, "-" without one."""
    return "-" if peer is None else f"{peer['ms'] / row['ms']:.2f}"


def plot(rows: list[Row], path: Path) -> None:
    """Images/s over the batch size, a line for each model and backend. Raises ValueError without matplotlib."""
    plots.save(lambda axes: plots.throughput(axes, rows), path, height=5)


def parse_batch_sizes(text: str) -> list[int]:
    """[1, 16, 64] of "1,16,64". Raises ValueError for anything but numbers of 1 to 65,536."""
    try:
        sizes = [int(batch) for batch in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > MOST_IMAGES:
        raise ValueError(f"--batch-sizes {shown(text)}: give batch sizes of 1 to {MOST_IMAGES}, such as 1,16,64")
    return sizes
