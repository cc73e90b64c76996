"""Steps of a benchmark: qswin commands in processes of their own, so that one that fails costs only its own figures."""

import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class Steps:
    """Runs commands, each on a GPU that no other step is using.

    Attributes:
        failed: {step: the end of what it said}.
    """

    def __init__(self, gpus: Iterable[str]) -> None:
        self._gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        for gpu in gpus:
            self._gpus.put(gpu)
        self.workers, self.start = self._gpus.qsize(), time.perf_counter()
        self.failed: dict[str, str] = {}

    def run(self, name: str, *command: str | Path) -> bool:
        """Runs `python -m COMMAND` to its end; says whether it succeeded."""
        gpu, begun = self._gpus.get(), time.perf_counter()
        arguments = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(
            arguments, text=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        )
        self._gpus.put(gpu)
        seconds = time.perf_counter() - begun
        print(f"{self.elapsed():6.0f} s  {name} ({seconds:.1f} s, exit {done.returncode})", flush=True)
        if done.returncode:
            self.failed[name] = done.stderr[-1500:]
            print(done.stderr[-1500:], flush=True)
        return done.returncode == 0

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def each(self, work: Callable[[Any], None], jobs: Iterable[Any]) -> None:
        """Does all jobs, in order, as many at once as there are GPUs."""
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(work, jobs))
