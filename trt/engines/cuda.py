"""The GPU: which one is here, and its events and graphs, through Polygraphy's handle of the CUDA runtime."""

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and Minor
CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@dataclasses.dataclass(frozen=True)
class Gpu:
    """`name` as the driver gives it, `capability` "9.0"."""

    name: str
    capability: str


def _cuda() -> Any:
    from polygraphy.cuda import wrapper

    return wrapper()


def find_gpu() -> Gpu | None:
    """The first GPU, or None where there is none or no CUDA runtime."""
    from polygraphy.exception import PolygraphyException

    try:
        runtime = _cuda().handle
    except (OSError, PolygraphyException):
        return None
    count = ctypes.c_int(0)
    if runtime.cudaGetDeviceCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    return Gpu(_name(runtime), f"{_attribute(runtime, MAJOR)}.{_attribute(runtime, MINOR)}")


def _attribute(runtime: Any, attribute: int) -> int:
    value = ctypes.c_int(0)
    _cuda().check(runtime.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0))
    return value.value


def _name(runtime: Any) -> str:
    properties = ctypes.create_string_buffer(
        8192
    )  # cudaDeviceProp begins with char name[256]; its size grows by version
    _cuda().check(runtime.cudaGetDeviceProperties(properties, 0))
    return properties.raw[:256].split(b"\0")[0].decode()


class Stopwatch:
    """Milliseconds between two CUDA events on a stream."""

    def __init__(self, stream: int) -> None:
        self._stream = ctypes.c_void_p(stream)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            _cuda().check(_cuda().handle.cudaEventCreate(ctypes.byref(event)))

    def time(self, work: Callable[[], None]) -> float:
        """How long what `work` puts on the stream takes, in milliseconds."""
        runtime, elapsed = _cuda().handle, ctypes.c_float(0)
        _cuda().check(runtime.cudaEventRecord(self._events[0], self._stream))
        work()
        _cuda().check(runtime.cudaEventRecord(self._events[1], self._stream))
        _cuda().check(runtime.cudaEventSynchronize(self._events[1]))
        _cuda().check(runtime.cudaEventElapsedTime(ctypes.byref(elapsed), *self._events))
        return elapsed.value


@contextlib.contextmanager
def captured(work: Callable[[], None], stream: int) -> Iterator[Callable[[], None]]:
    """Captures what `work` puts on the stream as a CUDA graph, and gives a function that launches it."""
    cuda, pointer = _cuda(), ctypes.c_void_p(stream)
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    cuda.check(cuda.handle.cudaStreamBeginCapture(pointer, CAPTURE_RELAXED))
    work()
    cuda.check(cuda.handle.cudaStreamEndCapture(pointer, ctypes.byref(graph)))
    cuda.check(cuda.handle.cudaGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)))
    try:
        yield lambda: cuda.check(cuda.handle.cudaGraphLaunch(executable, pointer))
    finally:
        cuda.check(cuda.handle.cudaGraphExecDestroy(executable))
        cuda.check(cuda.handle.cudaGraphDestroy(graph))
