"""The runner of cpp/, libqswin.so, by ctypes: a bundle on the GPU without torch."""

import ctypes
import functools
import os
import weakref
from typing import Any

VARIABLE = "QSWIN_LIBRARY"  # of the environment: where libqswin.so is, if the loader does not find it
LIBRARY = "libqswin.so"
HOW = f"build it (cmake -S cpp -B cpp/build && cmake --build cpp/build) and set {VARIABLE}=cpp/build/{LIBRARY}"


class Info(ctypes.Structure):
    """qswin_info of qswin.h."""

    _fields_ = (
        ("channels", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("classes", ctypes.c_uint32),
        ("architecture", ctypes.c_uint32),
        ("batch_count", ctypes.c_uint32),
        ("batches", ctypes.POINTER(ctypes.c_uint32)),
    )


@functools.cache
def library() -> Any:
    """The functions of libqswin.so. Raises ValueError where it is not found."""
    try:
        found = ctypes.CDLL(os.environ.get(VARIABLE, LIBRARY))
        found.qswin_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise ValueError(f"running a bundle needs {LIBRARY}, which is not found ({error}); {HOW}") from error
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    found.qswin_check.argtypes = [ctypes.c_char_p, size]
    found.qswin_open.argtypes = [ctypes.c_char_p, size, integer, ctypes.POINTER(pointer)]
    found.qswin_get_info.argtypes = [pointer, ctypes.POINTER(Info)]
    found.qswin_create_context.argtypes = [pointer, ctypes.c_uint32, ctypes.POINTER(pointer)]
    found.qswin_enqueue.argtypes = [pointer] * 4
    for name in ("qswin_destroy_context", "qswin_close"):
        getattr(found, name).argtypes, getattr(found, name).restype = [pointer], None
    return found


def _check(status: int) -> None:
    """Raises ValueError, with the library's line, unless a call succeeded."""
    if status:
        raise ValueError(library().qswin_error().decode())


class Context:
    """A workspace for a batch size, for one inference at a time."""

    def __init__(self, bundle: int, batch: int) -> None:
        handle = ctypes.c_void_p()
        _check(library().qswin_create_context(bundle, batch, ctypes.byref(handle)))
        self._handle = handle.value
        self.close = weakref.finalize(self, library().qswin_destroy_context, handle.value)

    def enqueue(self, stream: int, images: int, logits: int) -> None:
        """Puts an inference on a CUDA stream.

        Args:
            stream: the stream's address.
            images, logits: addresses on the GPU, multiples of 16, of (N, C, H, W) and (N, classes) float32.
        """
        _check(library().qswin_enqueue(self._handle, stream, images, logits))


class Runner:
    """A bundle's code and weights on a GPU.

    Args:
        data: the bundle's bytes.

    Attributes:
        architecture: whose code is run, 90 of compute capability 9.0.

    Raises:
        ValueError: libqswin.so or a driver is missing, the bytes are no bundle, it holds no code for this GPU, or the
            GPU has too little memory.
    """

    def __init__(self, data: bytes, device: int = 0) -> None:
        handle, info = ctypes.c_void_p(), Info()
        _check(library().qswin_open(data, len(data), device, ctypes.byref(handle)))
        assert handle.value is not None
        self._handle = handle.value
        self.close = weakref.finalize(self, library().qswin_close, handle.value)
        _check(library().qswin_get_info(handle, ctypes.byref(info)))
        self.architecture: int = info.architecture

    def context(self, batch: int) -> Context:
        """A workspace for one of the bundle's batch sizes."""
        return Context(self._handle, batch)


def check(data: bytes) -> None:
    """Checks a bundle's bytes by the library's reader, without a GPU. Raises ValueError as `Runner` does."""
    _check(library().qswin_check(data, len(data)))
