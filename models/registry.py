"""Model names, builders and checkpoint files. A family is a module like models/swin.py; FAMILIES lists them."""

import contextlib
import difflib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qswin.models import cvt, swin, swin_unet, vit
from qswin.models.download import cache_only_if_unreachable

FAMILIES: tuple[ModuleType, ...] = (swin, vit, cvt, swin_unet)
WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_state")  # where training frameworks keep the weights


def family_of(name: str) -> ModuleType:
    """The family that builds `name`. Raises ValueError, listing the nearest names, when none does."""
    for family in FAMILIES:
        if name in family.names():
            return family
    known = [known for family in FAMILIES for known in family.names()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(f"model {name!r} is not known; the nearest names are {', '.join(near)}")


def build_model(
    name: str,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a float model in evaluation mode.

    Args:
        num_classes: None keeps the architecture's own number.
        checkpoint: weights to load, .safetensors, .pth or .pt, with timm's names or the original repository's.
        pretrained: download the published weights; only without `checkpoint`.
        kwargs: settings of the architecture, as its library names them.

    Raises:
        ValueError: the name is not known, a setting is wrong, the weights do not fit or cannot be downloaded.
    """
    family = family_of(name)
    download = pretrained and checkpoint is None
    try:
        with cache_only_if_unreachable() if download else contextlib.nullcontext():
            model = family.build(name, num_classes, pretrained=download, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model {name!r}: its settings do not work: {error}") from error
    except (OSError, RuntimeError) as error:
        if not download:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the pretrained weights of {name} cannot be downloaded ({reason}); "
            "download them where there is a network and pass model.checkpoint=FILE"
        ) from error
    if checkpoint is not None:
        load_weights(model, family, Path(checkpoint))
    return model.eval()


def load_weights(model: nn.Module, family: ModuleType, path: Path) -> None:
    """Loads a float checkpoint into `model`. Raises ValueError when it is not one, or is another model's."""
    state = read_state(path)
    expected = model.state_dict()
    first = next(iter(state), None)
    try:
        state = family.convert_state(state, model)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a checkpoint of this model ({error})") from error
    if not set(state) & set(expected):
        raise ValueError(f"{path}: a foreign checkpoint (its first tensor is {first!r}); none fits the model")
    check_state(state, expected, path)
    model.load_state_dict(state)


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError, naming the first tensor at fault, unless `state` has the names and shapes of `expected`."""
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{path}: {name} is missing; is it a checkpoint of this model?")
        if state[name].shape != tensor.shape:
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: {name} has shape {found}, the model has {wanted}; check model.name and num_classes")
    unknown = set(state) - set(expected)
    if unknown:
        raise ValueError(f"{path}: {min(unknown)} is not a tensor of this model; check model.name and the recipe")


BROKEN = (  # what torch raises over a damaged file
    *(RuntimeError, EOFError, OSError, ValueError),
    *(KeyError, IndexError, AttributeError, TypeError),
)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, as float32 where they are floating; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is no checkpoint, or holds pickled code.
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
        reason = "holds pickled code, which is never run" if "eights" in str(error) else "is truncated or no checkpoint"
        raise ValueError(f"{path}: {reason}; save only its state dict: torch.save(model.state_dict(), FILE)") from error
    except BROKEN as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path}: truncated, or not a PyTorch checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint but a {type(state).__name__}; save model.state_dict()")
    while (inner := next((key for key in WRAPPERS if isinstance(state.get(key), dict)), None)) is not None:
        state = state[inner]
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
