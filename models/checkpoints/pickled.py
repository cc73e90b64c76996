"""Files of torch.save that hold objects beside their tensors: a Namespace of arguments, a config.

torch.load(weights_only=True) refuses them. Here every object becomes a stand-in, which takes anything and does nothing.
Nothing that a file names is imported or called. Its storages are read here too, so torch's loader takes no part.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {  # of the classes that torch.save names
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


UNKNOWN = {code[0] for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER)}


class StandIn:
    """In place of an object of a class that is not read. Its own class keeps what the file calls that in `of`."""

    __slots__ = ()
    of = ""

    def __new__(cls, *args: object, **settings: object) -> "StandIn":
        """Takes what the object's class was called with."""
        return super().__new__(cls)

    def __setitem__(self, key: object, value: object) -> None:
        """Takes what a dict's subclass holds."""

    def append(self, value: object) -> None:
        """Takes what a list's subclass holds."""

    add = append


class _Call:
    """Stands for a function that rebuilds tensors. Without a `__dict__`, a file cannot change it."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any) -> Any:
        return REBUILD[self._name](*args)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> Tensor:
    """A view of a storage. `as_strided` raises RuntimeError where it would leave it."""
    if type(storage) is not Tensor:
        raise pickle.UnpicklingError("a tensor without a storage")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Any, *rest: object) -> Tensor:
    if type(data) is not Tensor:
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return data


REBUILD: dict[str, Callable[..., Tensor]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}
CONTAINERS = {  # Python 2's names too: torch.save writes pickle's protocol 2
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class _Unpickler(pickle._Unpickler):
    """Python's own, not that in C: an index of its memo costs no memory below it.

    No state is set, of any object. Opcodes that torch.save never writes and that could cost memory, or that ask a
    registry of this process, are unknown here.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in UNKNOWN}

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")), encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def load_build(self) -> None:
        """Drops an object's state."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str, /) -> Any:
        """A storage's type, a function that rebuilds tensors, a container, or a stand-in's class; all without state."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in REBUILD:
            return _Call(name)
        known = CONTAINERS.get((module, name))
        return known or type("StandIn", (StandIn,), {"__slots__": (), "of": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Tensor:
        """The values of a storage, (N,), read once however many tensors share them."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a reference that is not to a storage")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        storage = self._storages[key]
        return storage if storage.dtype == dtype else storage.view(dtype)


def read_with_stand_ins(data: bytes) -> Any:
    """What torch.save wrote, with a `StandIn` for every object but tensors, containers, numbers and strings.

    Args:
        data: the file's content, in the format that torch.save has written since 1.6, a zip archive.

    Raises:
        pickle.UnpicklingError: it is of another format, or its pickle cannot be read.
        Exception: any, from what a damaged file makes of Python's unpickler.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise pickle.UnpicklingError("the format of before torch 1.6")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        folder = next((name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")), "")
        if f"{folder}/constants.pkl" in names:
            raise pickle.UnpicklingError("a TorchScript archive")
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise pickle.UnpicklingError("written on a machine of the other byte order")
        return _Unpickler(archive, folder).load()


def stand_in_of(value: object) -> str | None:
    """What a stand-in, or a stand-in's class, stands for, such as "yacs.config.CfgNode"; None of any other value."""
    kind = value if isinstance(value, type) else type(value)
    return kind.of if issubclass(kind, StandIn) else None
