"""State dicts: reading them from files, renaming their tensors, comparing them with what a model has."""

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qswin.limits import MORE, scale
from qswin.models.checkpoints.json_files import read_json
from qswin.models.checkpoints.pickled import read_with_stand_ins, stand_in_of

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DDP, torch.compile and Lightning modules, before every name
WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_state")  # where training frameworks keep the weights
BROKEN = (  # what torch raises over a damaged file
    *(RuntimeError, EOFError, OSError, ValueError),
    *(AssertionError, KeyError, IndexError, AttributeError, TypeError, MemoryError, RecursionError, ArithmeticError),
    *(zipfile.BadZipFile, struct.error),
)
INDEX = ".index.json"
SAVE = "save only its state dict: torch.save(model.state_dict(), FILE)"
LARGEST_FILE = int(scale() * (1 << 34))  # bytes: the largest model's weights, with an optimizer's state beside them
DEEPEST = 4  # wrappings around the weights that are looked through


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after every (pattern, replacement), in order; patterns are regular expressions, searched anywhere."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """How `state` first differs from `expected` in names, shapes and types, with the tensor; None when it does not."""
    for name, tensor in expected.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        if state[name].is_floating_point() != tensor.is_floating_point():
            return f"{name} is of {state[name].dtype}, not {tensor.dtype}"
    unknown = set(state) - set(expected)
    return f"{min(unknown)} is not a tensor of this model" if unknown else None


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, naming the first tensor at fault, unless `state` has the names and shapes of `expected`."""
    difference = mismatch(state, expected)
    if difference is not None:
        raise ValueError(f"{path}: {difference}; check the model's name, its settings, num_classes and the recipe")


class Index(msgspec.Struct):
    """What is read of an index, by which transformers says which of several files holds a tensor."""

    weight_map: dict[str, str]


def read_content(path: Path) -> bytes:
    """The content of a checkpoint's file; of an index, that of one .safetensors file of all its files' tensors.

    Raises:
        FileNotFoundError: there is no such file, or one that the index names is missing.
        ValueError: the file is too large; the index, or a file that it names, cannot be read; or a tensor is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path}: {size / 2**30:.1f} GiB, larger than {LARGEST_FILE / 2**30:g} GiB; {MORE}")
    if not path.name.endswith(INDEX):
        return path.read_bytes()
    joined = {key: value.clone(memory_format=torch.contiguous_format) for key, value in _read_files_of(path).items()}
    return safetensors.torch.save(joined)


def _read_files_of(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which lie beside it. Raises as `read_content` does."""
    try:
        weight_map = read_json(index, Index).weight_map
    except ValueError as error:
        raise ValueError(f"{index.parent}: {error}") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if Path(name).name != name or name.endswith(INDEX):
            raise ValueError(f"{index}: {name!r} is not the name of a file of weights beside it; copy it again")
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, but {index.name} names it; copy the whole folder")
        state |= read_state(file)
    if missing := weight_map.keys() - state.keys():
        raise ValueError(f"{index}: {min(missing)} is in none of its files; copy the whole folder again")
    return state


def read_state(path: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, as float32 where they are floating; nothing in it is executed.

    Args:
        path: the file, or the index of several (`read_content`).
        data: the file's content, where it has been read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, is not a checkpoint, or holds pickled code; or a tensor, which is named, is
            not dense, real and finite in float32.
    """
    data = read_content(path) if data is None else data
    try:
        if path.suffix == ".safetensors" or path.name.endswith(INDEX):
            state: Any = safetensors.torch.load(data)
        else:
            _check_stored(data)
            state = _load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); copy it again") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: is truncated or not a checkpoint ({_first_line(error)}); {SAVE}") from error
    except BROKEN as error:
        reason = _first_line(error) or "it ends too early"
        raise ValueError(f"{path}: truncated, or not a PyTorch checkpoint ({reason})") from error
    return _tensors(state, path)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _load(data: bytes) -> Any:
    """What torch.save wrote: by torch where that suffices, else with stand-ins for the objects beside the tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return read_with_stand_ins(data)


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what a file holds, out of the wrappings that training frameworks put around them."""
    _refuse_pickled(state, path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint but a {type(state).__name__}; save model.state_dict()")
    for _ in range(DEEPEST):
        inner = next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = state[inner]
    else:
        raise ValueError(f"{path}: its weights are wrapped more than {DEEPEST} deep; save model.state_dict()")
    for key in WRAPPERS:
        _refuse_pickled(state.get(key), path)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix("module.")
        if "_rebuild_" in (stand_in_of(value) or ""):
            raise ValueError(f"{path}: {name} is a tensor by {stand_in_of(value)}, which is not read; save dense ones")
        if not isinstance(value, Tensor):
            continue
        if name in tensors:
            raise ValueError(f"{path}: {name} is there twice, once as module.{name}; save model.state_dict() again")
        tensors[name] = _plain(value, name, path)
    for value in () if tensors else state.values():
        _refuse_pickled(value, path)
    return without_prefixes(tensors)


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes that wrappers of a model put before every name, however many."""
    while state and (shared := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(shared): value for key, value in state.items()}
    return state


def _refuse_pickled(value: object, path: Path) -> None:
    """Raises ValueError for an object where weights should be: a whole model, say."""
    if (kind := stand_in_of(value)) is not None:
        raise ValueError(f"{path}: holds pickled code ({kind}), which is never run; {SAVE}")


def _plain(value: Tensor, name: str, path: Path) -> Tensor:
    """A tensor as this project computes with it, float32 if it is floating. Raises ValueError where that changes it."""
    dense = value.layout == torch.strided and not (value.is_quantized or value.is_nested or value.is_meta)
    if not dense or value.is_complex():
        kinds = ("is_sparse", "is_quantized", "is_nested", "is_meta")
        kind = next((kind[3:] for kind in kinds if getattr(value, kind)), f"{value.layout} {value.dtype}")
        raise ValueError(f"{path}: {name} is a {kind} tensor; save dense, real tensors of numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path}: {name} of shape {tuple(value.shape)} repeats few values; save its .contiguous()")
    if not value.is_floating_point():
        return value
    converted = value.float()
    if not bool(converted.isfinite().all()):
        what = "values beyond float32" if bool(value.isfinite().all()) else "NaN or infinite values"
        raise ValueError(f"{path}: {name} holds {what}; train or save it again")
    return converted


def _check_stored(data: bytes) -> None:
    """Raises ValueError for a zip file whose members are larger than the file: torch.save does not compress."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("it is compressed, which torch.save does not do")
