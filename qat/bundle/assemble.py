"""From traces to a bundle without its code: places of all tensors, the kernels that are needed, and their launches."""

import inspect
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qswin.qat.bundle.contents import (
    Argument,
    Batch,
    Bundle,
    Call,
    Kernel,
    Launch,
    Manifest,
    Space,
    TensorAt,
    buffer_of,
)
from qswin.qat.bundle.format import POINTER_ALIGNMENT, aligned
from qswin.qat.bundle.trace import Trace, Traced, storage_bytes, storage_of, tensor_at, tensors_of
from qswin.qat.bundle.workspace import Lifetime, plan_workspace
from qswin.qat.kernels import launch as kernels_launch

POINTERS = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
SCRATCH = (None, None)  # the last arguments of each kernel of Triton: its scratch memory and the profiler's, unused
DIVISIBLE = f":{POINTER_ALIGNMENT}"  # Triton's mark of a value that is divisible by 16, which it compiles for


class Specialized(NamedTuple):
    """A planned launch: the kernel that it needs, and the arguments that are left at run time, tensors still."""

    kernel: Kernel
    arguments: list[Any]

    @property
    def signature(self) -> str:
        letters = ("p" if isinstance(a, Tensor) else "f" if isinstance(a, float) else "i" for a in self.arguments)
        return "".join(letters) + "p" * len(SCRATCH)


def specialize(launch: kernels_launch.Launch) -> Specialized:
    """What Triton's launcher does: constants, and integers of 1, are compiled in; multiples of 16 are told apart.

    Pointers are multiples of 16, for `aligned` buffers are; reading a bundle checks it.
    """
    types, constants, arguments = {}, {}, []
    for name, parameter in inspect.signature(launch.kernel.fn).parameters.items():
        value = launch.arguments[name]
        if "constexpr" in str(parameter.annotation) or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        arguments.append(value)
        if isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype] + DIVISIBLE
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" + (DIVISIBLE if value % 16 == 0 else "")
    return Specialized(Kernel(launch.kernel.fn.__name__, types, constants, launch.options), arguments)


def stored(value: int | float) -> int | float:
    """A number as a bundle stores it: a float is a float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if isinstance(value, float) else value


class _Constants:
    """The bytes of the constants that are read, equal ones stored once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._offsets: dict[bytes, int] = {}

    def offset(self, tensor: Tensor) -> int:
        """Where the tensor lies. It is added at the end if it is new."""
        content = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        if content not in self._offsets:
            self.data += bytes(aligned(len(self.data)) - len(self.data))
            self._offsets[content] = len(self.data)
            self.data += content
        return self._offsets[content]


def assemble(traces: Mapping[int, Trace], model: dict[str, Any]) -> tuple[Bundle, list[kernels_launch.Launch]]:
    """A bundle without code, and for each of its kernels a launch that it is compiled for.

    Args:
        traces: {images of a batch: trace}.
        model: see `Manifest`.

    Raises:
        ValueError: a tensor of the model is not one that kernels can read.
    """
    constants, kernels, batches, calls = _Constants(), _Kernels(), [], []
    for size, traced in sorted(traces.items()):
        places, workspace = _places(traced, constants)
        launches = tuple(kernels.launch(call.launch, places) for call in traced.calls)
        batches.append(Batch(size, workspace, launches))
        calls.append([_call(call, places) for call in traced.calls])
    first = next(iter(traces.values()))
    channels, height, width = first.image.shape[1:]
    manifest = Manifest(model, kernels.kernels, calls)
    classes, signatures = first.logits.shape[1], tuple(kernels.signatures)
    bundle = Bundle(manifest, (channels, height, width), classes, signatures, tuple(batches), bytes(constants.data), {})
    return bundle, kernels.examples


class _Kernels:
    """The kernels that launches need, each once."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.signatures: list[str] = []
        self.examples: list[kernels_launch.Launch] = []

    def launch(self, launch: kernels_launch.Launch, places: "_Places") -> Launch:
        """The launch as a bundle stores it."""
        specialized = specialize(launch)
        if specialized.kernel not in self.kernels:
            self.kernels.append(specialized.kernel)
            self.signatures.append(specialized.signature)
            self.examples.append(launch)
        grid = (*launch.grid, 1, 1)[:3]
        arguments: list[Argument] = [*map(places.argument, specialized.arguments), *SCRATCH]
        return Launch(self.kernels.index(specialized.kernel), (grid[0], grid[1], grid[2]), tuple(arguments))


class _Places:
    """{storage: the space that it lies in, and where it begins}."""

    def __init__(self, places: dict[int, tuple[Space, int]]) -> None:
        self._places = places

    def tensor(self, tensor: Tensor) -> TensorAt:
        return tensor_at(tensor, *self._places[storage_of(tensor)])

    def argument(self, value: Any) -> Argument:
        return buffer_of(self.tensor(value)) if isinstance(value, Tensor) else stored(value)


def _places(traced: Trace, constants: _Constants) -> tuple[_Places, int]:
    """Where each tensor of a trace lies, and the bytes of workspace."""
    places: dict[int, tuple[Space, int]] = {
        storage_of(traced.image): ("input", 0),
        storage_of(traced.logits): ("output", 0),
    }
    lifetimes: dict[int, Lifetime] = {}
    for index, call in enumerate(traced.calls):
        for tensor in tensors_of(call):
            storage = storage_of(tensor)
            if storage in traced.constants:
                places[storage] = ("constants", constants.offset(traced.constants[storage]))
            elif storage not in places:
                first = lifetimes[storage].first if storage in lifetimes else index
                lifetimes[storage] = Lifetime(storage_bytes(tensor), first, index)
    offsets, workspace = plan_workspace(lifetimes)
    return _Places(places | {storage: ("workspace", offset) for storage, offset in offsets.items()}), workspace


def _call(call: Traced, places: _Places) -> Call:
    """The call as the manifest has it."""
    arguments = (
        places.tensor(a)
        if isinstance(a, Tensor)
        else str(a).removeprefix("torch.")
        if isinstance(a, torch.dtype)
        else a
        for a in call.arguments
    )
    return Call(call.operator, tuple(arguments), places.tensor(call.launch.out))
