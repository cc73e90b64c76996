"""State dicts: reading them from files, renaming their tensors, comparing them with what a model has."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_state")  # where training frameworks keep the weights
BROKEN = (  # what torch raises over a damaged file
    *(RuntimeError, EOFError, OSError, ValueError),
    *(KeyError, IndexError, AttributeError, TypeError),
)


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after every (pattern, replacement), in order; patterns are regular expressions, searched anywhere."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """How `state` first differs from `expected` in names and shapes, naming the tensor; None when it does not."""
    for name, tensor in expected.items():
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
    unknown = set(state) - set(expected)
    return f"{min(unknown)} is not a tensor of this model" if unknown else None


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, naming the first tensor at fault, unless `state` has the names and shapes of `expected`."""
    difference = mismatch(state, expected)
    if difference is not None:
        raise ValueError(f"{path}: {difference}; check the model's name, its settings, num_classes and the recipe")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, as float32 where they are floating; nothing in it is executed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, is not a checkpoint, or holds pickled code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); copy it again") from error
    except pickle.UnpicklingError as error:
        if "eights" in str(error):
            reason = "holds pickled code, which is never run"
        else:
            reason = "is truncated or not a checkpoint"
        raise ValueError(f"{path}: {reason}; save only its state dict: torch.save(model.state_dict(), FILE)") from error
    except BROKEN as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path}: truncated, or not a PyTorch checkpoint ({reason})") from error
    return _tensors(state, path)


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of what a file holds, out of the wrappings that training frameworks put around them."""
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint but a {type(state).__name__}; save model.state_dict()")
    opened: list[Any] = []
    while (inner := next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)) is not None:
        opened.append(state)
        state = state[inner]
        if any(state is outer for outer in opened):
            raise ValueError(f"{path}: its {inner!r} contains itself; save model.state_dict()")
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
