"""Model names and builders, over the families that are known."""

import difflib
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from qswin import models
from qswin.models.discovery import offers
from qswin.models.download import cache_only_if_unreachable
from qswin.models.family import Family
from qswin.models.limits import LARGEST_CLASSES, Bounded
from qswin.models.state_dicts import check_state, read_state, rename

ENTRY_POINTS = "qswin.families"  # each is the place of a Family, `package.module:FAMILY`


@functools.cache
def _known() -> dict[str, Family]:
    """{name: family}, at first those that the modules of models/ offer as FAMILY, and those of installed packages."""
    return {family.name: family for family in (*offers(models, "FAMILY"), *_installed())}


def _installed() -> Iterator[Family]:
    """The families that other installed packages declare, so that commands know them too."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            yield entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{ENTRY_POINTS}: {entry.name} = {entry.value} cannot be loaded: {error}") from error


def families() -> tuple[Family, ...]:
    """Every known family: those of models/, of installed packages, and those that were registered."""
    return tuple(_known().values())


def register_family(family: Family) -> None:
    """Makes a family known, one that is defined outside models/. Registering a name again replaces that family.

    Raises:
        ValueError: another family builds a model of the same name.
    """
    for other in families():
        shared = set(family.names()) & set(other.names())
        if shared and other.name != family.name:
            raise ValueError(f"family {family.name!r}: the model name {min(shared)!r} belongs to family {other.name!r}")
    _known()[family.name] = family


def family_of(name: str) -> Family:
    """The family that builds `name`. Raises ValueError, listing the nearest names, when none does."""
    for family in families():
        if name in family.names():
            return family
    known = [known for family in families() for known in family.names()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(f"model {name!r} is not known; the nearest names are {', '.join(near)}")


def site_name(path: str) -> str:
    """What recipes call the module at `path`: `backbone.head` for `backbone.head.fc` of a Swin in a larger model."""
    return rename(path, (pair for family in families() for pair in family.sites))


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
        ValueError: the name is not known; a setting is wrong, not allowed or too large; the weights do not fit or
            cannot be downloaded.
    """
    family = family_of(name)
    family.check_settings(name, kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in family.fixed}
    _check_classes(name, num_classes)
    download = pretrained and checkpoint is None
    try:
        with cache_only_if_unreachable() if download else Bounded(name):
            model = family.build(name, num_classes, pretrained=download, **kwargs)
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"model {name!r}: its settings do not work: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        if not download:
            raise ValueError(f"model {name!r}: its settings do not work: {_first_line(error)}") from error
        raise ValueError(
            f"the pretrained weights of {name} cannot be downloaded ({_first_line(error)}); "
            "download them where there is a network and pass model.checkpoint=FILE"
        ) from error
    if checkpoint is not None:
        load_weights(model, family, Path(checkpoint))
    return model.eval()


def _check_classes(name: str, num_classes: Any) -> None:
    if num_classes is None:
        return
    if not isinstance(num_classes, int) or not 1 <= num_classes <= LARGEST_CLASSES:
        found = num_classes if isinstance(num_classes, int) else repr(num_classes)
        raise ValueError(f"model {name!r}: num_classes={found} is not supported; give 1 or more, to {LARGEST_CLASSES}")


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def load_weights(model: nn.Module, family: Family, path: Path, data: bytes | None = None) -> None:
    """Loads a float checkpoint into `model`.

    Args:
        data: the file's content, where it has been read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, or is another model's.
    """
    state = read_state(path, data)
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
