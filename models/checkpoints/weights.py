"""Trained weights as a family's model takes them, out of a file or folder of any library that the family knows."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from qswin.models.checkpoints.state_dicts import INDEX
from qswin.models.checkpoints.unsupported import refuse_unsupported

# Of a folder that transformers' save_pretrained wrote; an index names several files of tensors.
PATCH_EMBED = "patch_embed.proj.weight"
FILES = ("model.safetensors", "pytorch_model.bin", f"model.safetensors{INDEX}", f"pytorch_model.bin{INDEX}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds, and what its library says of it.

    Args:
        state: tensors under the names of the family's models.
        library: where they come from, such as "torchvision"; None where the family alone knows.
        settings: of the architecture, which these weights need and no shape tells: an epsilon, a window.
        preprocessing: what images were prepared by, over the model's own; keys of
            qswin.calib.data.images.Preprocessing, but for its size.
        preprocessing_from: a word on where that is known from; None where the model's own is taken.
        classes: names in the order of the logits, where the checkpoint has some.
        told: settings, too, that the file mentions, but that are left to the model's name: weights may be fine-tuned to
            another size.
        headless: why the model's head cannot be had from them; None where it can.
        grey: they were for images of one channel. Of three equal ones they now compute the same.
        file: the one that holds the tensors, or the index of several.
        sha256: of its content, as `read_content` gives it.
    """

    state: dict[str, Tensor]
    library: str | None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing_from: str | None = None
    classes: tuple[str, ...] | None = None
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    headless: str | None = None
    grey: bool = False
    file: Path | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A library whose checkpoints a family loads.

    Args:
        mark: a pattern that one of its keys matches, and no key of the sources after it in a family's list.
        unless: a pattern that none of its keys matches.
        read: called with the tensors and the folder they lie in, it gives the weights, or raises ValueError.
    """

    mark: str
    read: Callable[[dict[str, Tensor], Path], Weights]
    unless: str = "(?!)"  # which matches nothing

    def knows(self, state: Collection[str]) -> bool:
        """Whether these are the keys of this source."""
        marked = any(re.match(self.mark, key) for key in state)
        return marked and not any(re.match(self.unless, key) for key in state)


def weights_file(path: Path) -> Path:
    """The file of tensors that a path means: itself, or the one, or the index, in a folder that save_pretrained wrote.

    Raises:
        FileNotFoundError: nothing is there, or the folder holds no weights.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: a folder without weights; it must hold {' or '.join(FILES[:2])}")
    return found


def weights_of(
    state: dict[str, Tensor],
    file: Path,
    sources: Collection[Source],
    others: Mapping[str, Collection[Source]] = MappingProxyType({}),
) -> Weights:
    """The weights that a file's tensors are, by whichever of the sources knows their keys.

    Args:
        sources: of the family whose model is wanted; without any, the tensors are taken as they are.
        others: of other families, by their names.

    Raises:
        ValueError: no source knows them, they are of a model that is not supported, or some are missing.
    """
    try:
        refuse_unsupported(state)
        weights = of_three_channels(_source_of(state, sources, others).read(state, file.parent))
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{file}: not a whole checkpoint of the library that it seems to be from ({error})") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return dataclasses.replace(weights, file=file)


def _source_of(state: Collection[str], sources: Collection[Source], others: Mapping[str, Collection[Source]]) -> Source:
    if not sources:
        return Source("", lambda state, folder: Weights(state, None))
    for source in sources:
        if source.knows(state):
            return source
    what = f"a foreign checkpoint (its first tensor is {next(iter(state), None)!r})"
    family = next((name for name, known in others.items() if any(source.knows(state) for source in known)), None)
    if family is not None:
        raise ValueError(f"{what} of the family {family!r}; choose a model.name of it: qswin init FILE says which")
    raise ValueError(f"{what}; docs/models.md lists the libraries whose checkpoints load")


def of_three_channels(weights: Weights) -> Weights:
    """Weights for images of three channels; see `Weights.grey`. Raises ValueError for others than of one or three."""
    weight = weights.state.get(PATCH_EMBED)
    if weight is None or weight.ndim != 4 or weight.shape[1] == 3:
        return weights
    if weight.shape[1] != 1:
        what = f"its {PATCH_EMBED} takes {weight.shape[1]} channels, and images have one or three here"
        raise ValueError(f"{what}; nothing that is quantized here takes others")
    state = {**weights.state, PATCH_EMBED: weight.repeat(1, 3, 1, 1) / 3}
    return dataclasses.replace(weights, state=state, grey=True)
