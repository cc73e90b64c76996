"""Model names and builders, over the families that are known."""

import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from torch import Tensor, nn

from qswin import models
from qswin.models.backbones.backbone import Backbone
from qswin.models.checkpoints.architectures import Recognized
from qswin.models.checkpoints.other_names import HUB, name_here
from qswin.models.checkpoints.state_dicts import mismatch, read_content, read_state, rename
from qswin.models.checkpoints.unsupported import why_unsupported
from qswin.models.checkpoints.weights import Weights, weights_file, weights_of
from qswin.models.discovery import offers
from qswin.models.download import cache_only_if_unreachable
from qswin.models.family import Family
from qswin.models.limits import LARGEST_CLASSES, Bounded

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
    """The family that builds `name`, which may have timm's tag of weights behind a dot.

    Raises:
        ValueError: none does. It tells what another library's name is called here, or the nearest names.
    """
    for family in families():
        if name in family.names() or name.partition(".")[0] in family.names():
            return family
    if HUB.match(name):
        what = "names a model on a hub, and nothing is downloaded from there"
        raise ValueError(f"model {name!r} {what}; download its folder, and give that as model.checkpoint")
    reason = why_unsupported(name)
    if reason is not None:
        raise ValueError(f"model {name!r}: {reason}")
    known = [known for family in families() for known in family.names()]
    if ours := name_here(name, known):
        raise ValueError(f"model {name!r} is called {ours} here")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(f"model {name!r} is not known; the nearest names are {', '.join(near)}")


def task_of(arguments: Mapping[str, Any]) -> str:
    """What the model of `build_model`'s arguments is for: its family's task, or "features" for a backbone."""
    return "features" if arguments.get("out_features") else family_of(arguments["name"]).task


def site_name(path: str) -> str:
    """What recipes call the module at `path`: `backbone.head` for `backbone.head.fc` of a Swin in a larger model."""
    return rename(path, (pair for family in families() for pair in family.sites))


def read_checkpoint(name: str, path: str | Path) -> Weights:
    """The trained weights in a file or folder, as the family of the model `name` takes them.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        ValueError: the model is not known, or no library that its family knows wrote the file; says which did.
    """
    family = family_of(name)
    others = {other.name: other.sources for other in families() if other.name != family.name}
    file = weights_file(Path(path))
    content = read_content(file)
    weights = weights_of(read_state(file, content), file, family.sources, others)
    return dataclasses.replace(weights, sha256=hashlib.sha256(content).hexdigest())


def recognize(path: str | Path) -> tuple[Weights, Recognized]:
    """The trained weights in a file or folder, and which model they are of, by their tensors.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        ValueError: no family knows them.
    """
    file = weights_file(Path(path))
    state = read_state(file)
    known = [(family.sources, family.recognize) for family in families() if family.recognize is not None]
    sources, of_family = next((pair for pair in known if any(source.knows(state) for source in pair[0])), ((), None))
    weights = weights_of(state, file, sources or [source for pair in known for source in pair[0]])
    assert of_family is not None  # or no source knew them
    try:
        return weights, of_family(weights)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file}: not a whole checkpoint ({error} is missing)") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def build_model(
    name: str,
    num_classes: int | None = None,
    checkpoint: str | Path | Weights | None = None,
    pretrained: bool = False,
    new_head: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Builds a float model in evaluation mode.

    Args:
        num_classes: None keeps the architecture's own number.
        checkpoint: weights to load, of any library that docs/models.md lists: a file (.safetensors, .pth, .pt, .bin), a
            folder that save_pretrained wrote, or what `read_checkpoint` gave.
        pretrained: download the published weights; only without `checkpoint`.
        new_head: leave the checkpoint's head out, whatever its number of classes: the model's is random, to be trained.
        kwargs: settings of the architecture, as its library names them. They go before what the checkpoint asks for.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the name is not known; a setting is wrong, not allowed or too large; the weights do not fit or
            cannot be downloaded.
    """
    family = family_of(name)
    family.check_settings(name, kwargs)
    _check_classes(name, num_classes)
    if new_head and checkpoint is None:
        raise ValueError(f"model {name!r}: new_head=true needs the checkpoint whose backbone is taken")
    weights = read_checkpoint(name, checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    if weights is not None:
        kwargs = {**weights.settings, **kwargs}
        family.check_settings(name, kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in family.fixed}
    model = _build(family, name, num_classes, pretrained and weights is None, kwargs)
    if weights is not None:
        load_weights(model, family, weights, new_head)
    return model.eval()


def _build(family: Family, name: str, num_classes: int | None, download: bool, settings: dict[str, Any]) -> nn.Module:
    """The model, with random weights or those that are downloaded. Raises ValueError as `build_model` does."""
    try:
        with cache_only_if_unreachable() if download else Bounded(name):
            return family.build(name, num_classes, pretrained=download, **settings)
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"model {name!r}: its settings do not work: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        if not download:
            raise ValueError(f"model {name!r}: its settings do not work: {_first_line(error)}") from error
        raise ValueError(
            f"the pretrained weights of {name} cannot be downloaded ({_first_line(error)}); "
            "download them where there is a network and pass model.checkpoint=FILE"
        ) from error


def _check_classes(name: str, num_classes: Any) -> None:
    if num_classes is None:
        return
    if not isinstance(num_classes, int) or not 1 <= num_classes <= LARGEST_CLASSES:
        found = num_classes if isinstance(num_classes, int) else repr(num_classes)
        raise ValueError(f"model {name!r}: num_classes={found} is not supported; give 1 or more, to {LARGEST_CLASSES}")


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def load_weights(model: nn.Module, family: Family, weights: Weights, new_head: bool = False) -> None:
    """Loads trained weights into `model`.

    Args:
        new_head: the model keeps its own head.

    Raises:
        ValueError: they are another model's, or their head cannot be the model's.
    """
    expected, state = model.state_dict(), weights.state
    if new_head:
        own = {key: value for key, value in expected.items() if key.startswith(family.head)}
        state = {**{key: value for key, value in state.items() if not key.startswith(family.head)}, **own}
    elif weights.headless is not None and not isinstance(model, Backbone):
        raise ValueError(f"{weights.file}: {weights.headless}; to fine-tune it with a new head set model.new_head=true")
    try:
        converted = family.convert_state(state, model)
    except ValueError as error:
        raise ValueError(f"{weights.file}: not a checkpoint of this model ({error})") from error
    except (KeyError, RuntimeError, AttributeError, IndexError) as error:
        what = mismatch(state, expected) or str(error)
        raise ValueError(f"{weights.file}: not a checkpoint of this model ({what})") from error
    if not set(converted) & set(expected):
        raise ValueError(f"{weights.file}: a foreign checkpoint (its first tensor is {next(iter(state), None)!r})")
    difference = mismatch(converted, expected)
    if difference is not None:
        raise ValueError(f"{weights.file}: {difference}; {_remedy(difference, family)}")
    _tell(weights, state, converted, new_head)
    model.load_state_dict(converted)


def _remedy(difference: str, family: Family) -> str:
    if difference.startswith(family.head):
        return "check num_classes, or set model.new_head=true to fine-tune with a new head"
    return "check the model's name, its settings, num_classes and the recipe"


def _tell(weights: Weights, state: dict[str, Tensor], converted: dict[str, Tensor], new_head: bool) -> None:
    """A line where the model does not compute what the checkpoint's did."""
    if new_head:
        logging.info("%s: its backbone is loaded; the head is new and random, to be trained", weights.file)
    resized = [key for key, value in converted.items() if key in state and value.shape != state[key].shape]
    if resized:
        what = "tensors are resized to this model's windows and image size; accuracy may need fine-tuning"
        logging.warning("%s: %d %s (first %s)", weights.file, len(resized), what, resized[0])
