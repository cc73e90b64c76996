"""A graph from elsewhere in ONNX Runtime on the CPU: loading and running it end, and take no more memory than is free.

A graph of a few bytes can ask for 10^12 values, or for a loop that does not end.
"""

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from qswin.calib.messages import printable
from qswin.limits import VARIABLE, scale

ERRORS = (
    *(errors.Fail, errors.RuntimeException, errors.EPFail, errors.InvalidGraph, errors.InvalidProtobuf),
    *(errors.InvalidArgument, errors.NotImplemented),
    *(MemoryError, UnicodeDecodeError),  # of a damaged name
)
SHARE = 0.75  # of the free memory
GRACE = 5.0  # seconds in which an operation may end after its run was stopped


def memory_limit() -> int | None:
    """Bytes that this process may have in its own memory: what it has, and a share of what is free. None if unknown."""
    try:
        own, free = _bytes("/proc/self/status", "VmData"), _bytes("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):  # not Linux
        return None
    return own + int(SHARE * scale() * free)


def _bytes(file: str, key: str) -> int:
    """Of a line such as `VmData:     1024 kB`."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def limited_memory(most: int | None) -> Iterator[None]:
    """While it is entered, memory beyond `most` bytes is refused to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if most is None or (soft != resource.RLIM_INFINITY and soft <= most):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class Session:
    """A graph, loaded.

    Args:
        path: the graph's file, which messages name.
        model: its content.
        timeout: seconds that loading and each run may take; None for any number. Where an operation goes on for
            `GRACE` seconds after that, the process is ended with exit code 2: nothing else stops it.
        threads: of computing; 0 for all cores.
        disabled: optimizers that are left out.
        fuse: whether ONNX Runtime may change the graph; else it gives every tensor of it.

    Raises:
        ValueError: the graph cannot be loaded, in this time and in the memory that is free.
    """

    def __init__(
        self,
        path: str | Path,
        model: bytes,
        timeout: float | None = None,
        threads: int = 0,
        disabled: Sequence[str] = (),
        fuse: bool = True,
    ) -> None:
        self._path, self._timeout, self._most = path, timeout, memory_limit()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is said once, by the error
        options.add_session_config_entry("session.x64quantprecision", "1")  # INT8 sums without VNNI: 32 bits, not 16
        if not fuse:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with self._bounded("load"):
            self.session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
            )

    def run(self, outputs: Sequence[str], images: np.ndarray) -> list[np.ndarray]:
        """Values of the graph's outputs for images (N, 3, H, W).

        Raises:
            ValueError: the graph cannot be run, in its time and in the memory that was free when it was loaded.
        """
        with self._bounded("run") as options:
            return self.session.run(list(outputs), {"input": images}, options)

    @contextlib.contextmanager
    def _bounded(self, doing: str) -> Iterator[onnxruntime.RunOptions]:
        """Bounds what is done in it; gives options by which a run is stopped."""
        options, late, done = onnxruntime.RunOptions(), threading.Event(), threading.Event()
        options.log_severity_level = 4

        def stop() -> None:
            late.set()
            options.terminate = True
            if not done.wait(GRACE):
                _end(self._too_long(doing))

        timer = threading.Timer(self._timeout or 0, stop)
        timer.daemon = True
        if self._timeout:
            timer.start()
        try:
            with limited_memory(self._most):
                yield options
        except ERRORS as error:
            raise ValueError(self._too_long(doing) if late.is_set() else self._failed(doing, error)) from error
        finally:
            done.set()
            timer.cancel()

    def _too_long(self, doing: str) -> str:
        return f"{self._path}: to {doing} it took longer than {self._timeout:g} s; give a larger --timeout"

    def _failed(self, doing: str, error: Exception) -> str:
        text = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
            return (
                f"{self._path}: to {doing} it takes more than {100 * SHARE:.0f} % of the memory that is free;"
                f" take smaller batches, or set {VARIABLE}=2 in the environment"
            )
        reason = text.partition("\n")[0] or type(error).__name__  # some releases say nothing
        return f"{self._path}: ONNX Runtime cannot {doing} it ({reason}); export it again"


def _end(message: str) -> None:
    """Ends the process from another thread than that which does not come back from an operation."""
    print(f"qswin: error: {printable(message)}", file=sys.stderr, flush=True)
    os._exit(2)
