"""What a bundle holds, as plain data. docs/bundle.md describes the file, format.py reads and writes it."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from qswin.calib.validation import Count, Name

ALIGNMENT = 256  # bytes, of sections, constants and the workspace's buffers
SPACES = ("workspace", "constants", "input", "output")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # that the kernels are compiled for in the tests
Space = Literal["workspace", "constants", "input", "output"]
Dtype = Literal["int8", "int32", "float16", "float32", "float8_e4m3fn"]
ITEMSIZE = {"int8": 1, "int32": 4, "float16": 2, "float32": 4, "float8_e4m3fn": 1}


class Buffer(NamedTuple):
    """Bytes of a space that a kernel gets a pointer to."""

    space: Space
    offset: int
    size: int


Argument = Buffer | int | float | None  # None is a null pointer


class Launch(NamedTuple):
    """A launch: of which kernel, the programs in each dimension, and the kernel's arguments in order."""

    kernel: int
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


class Batch(NamedTuple):
    """What is run for a batch of `size` images, and the bytes of workspace that it needs."""

    size: int
    workspace: int
    launches: tuple[Launch, ...]


class Cubin(NamedTuple):
    """A kernel's machine code: the name of its function, bytes of shared memory and threads of a program."""

    code: bytes
    function: str
    shared: int
    threads: int


@dataclasses.dataclass(frozen=True)
class TensorAt:
    """A tensor of an operator: contiguous, `offset` bytes into a space."""

    space: Space
    offset: Annotated[int, Meta(ge=0, le=1 << 44)]
    shape: Annotated[tuple[Count, ...], Meta(max_length=8)]
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class Call:
    """The operator that a launch stands for. A dtype among its arguments is its name."""

    operator: Name
    arguments: Annotated[tuple[TensorAt | bool | int | float | str, ...], Meta(max_length=16)]
    result: TensorAt


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel was compiled from.

    Attributes:
        function: its name.
        types: {parameter: its type in Triton}, "*fp16", "i32", "constexpr".
        constants: {parameter: value}, of those that are constants.
        options: num_warps and num_stages.
    """

    function: Name
    types: dict[str, Name]
    constants: dict[str, bool | int]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself, in JSON.

    Attributes:
        model: what the sidecar says too: preprocessing, classes, precision, checkpoint.
        kernels: in the order of the kernels' indices.
        calls: of each batch size, one for each launch.
    """

    model: dict[str, Any]
    kernels: list[Kernel]
    calls: list[list[Call]]


class Bundle(NamedTuple):
    """A whole bundle.

    Attributes:
        manifest: for people, the interpreter and Python; the runner does not read it.
        image: (channels, height, width) of an image, float32.
        classes: logits of an image, float32.
        signatures: of each kernel: p, i or f for each argument: a pointer, an int32 or a float32.
        batches: in ascending order of their sizes.
        constants: the bytes of weights, scales and indices.
        code: {architecture, 80: the cubin of each kernel}.
    """

    manifest: Manifest
    image: tuple[int, int, int]
    classes: int
    signatures: tuple[str, ...]
    batches: tuple[Batch, ...]
    constants: bytes
    code: dict[int, tuple[Cubin, ...]]


def space_sizes(bundle: Bundle, batch: Batch) -> dict[str, int]:
    """{space: its bytes} when a batch is run."""
    channels, height, width = bundle.image
    return {
        "workspace": batch.workspace,
        "constants": len(bundle.constants),
        "input": 4 * batch.size * channels * height * width,
        "output": 4 * batch.size * bundle.classes,
    }


def buffer_of(tensor: TensorAt) -> Buffer:
    """The bytes of a tensor."""
    size = ITEMSIZE[tensor.dtype]
    for side in tensor.shape:
        size *= side
    return Buffer(tensor.space, tensor.offset, size)
