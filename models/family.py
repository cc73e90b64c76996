"""Family: all that the rest of the code asks of a family of models, in one object."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from qswin.models.checkpoints.architectures import Recognize
from qswin.models.checkpoints.weights import Source
from qswin.models.limits import check_settings

TASKS = ("classification", "segmentation")


def _as_it_is(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return state


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of float models.

    A module of models/ offers its family as `FAMILY`. Code outside the package calls `registry.register_family`, or is
    installed with an entry point of the group `qswin.families`, for the commands to know it.

    Args:
        name: the family's own, such as "swin".
        task: "classification" or "segmentation".
        names: gives the names of the models that `build` knows.
        build: called as build(name, num_classes, pretrained=..., **kwargs), it makes a float model, (N, 3, H, W) ->
            logits, whose attribute `num_classes` is the number of classes. None keeps the architecture's own number.
        preprocessing: gives a model's own size, mean, std, interpolation and crop_pct; the keys are those of
            qswin.calib.data.images.Preprocessing.
        convert_state: called with a state dict of a source, or in a layout that people hold, and the model it is for,
            it gives the state under the model's own names.
        sources: the libraries whose checkpoints load, of which the first that knows a checkpoint's keys reads it;
            without any, all is up to `convert_state`.
        recognize: says which of the family's models weights are of; None where nothing does.
        head: what the names of the classifier's parameters begin with, which fine-tuning may begin anew.
        sites: (pattern, replacement) pairs that turn the path of a module into the name that recipes use, as
            `state_dicts.rename` applies them. Every model is renamed by the pairs of all families.
        no_weight_decay: how the names of parameters end that have two or more dimensions and take no weight decay.
        fixed: settings of the architecture that work with one value only: {setting: (value, why)}.
        settings: names of the other settings that `build` takes. A config or a sidecar can give these and no others, so
            none may name a file, an address or a device.
    """

    name: str
    task: str
    names: Callable[[], Collection[str]]
    build: Callable[..., nn.Module]
    preprocessing: Callable[[Any], dict[str, Any]]
    convert_state: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = _as_it_is
    sources: tuple[Source, ...] = ()
    recognize: Recognize | None = None
    head: tuple[str, ...] = ("head.",)
    sites: tuple[tuple[str, str], ...] = ()
    no_weight_decay: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    settings: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"family {self.name!r}: task {self.task!r} is not known; choose {' or '.join(TASKS)}")

    def check_settings(self, model: str, settings: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the model and the setting, for one that is unknown, too large or does not work."""
        unknown = [setting for setting in settings if setting not in self.settings and setting not in self.fixed]
        if unknown:
            known = ", ".join(sorted(self.settings)) or "none"
            raise ValueError(f"model {model!r}: {unknown[0]!r} is not a setting of the architecture; there are {known}")
        try:
            check_settings(settings)
        except ValueError as error:
            raise ValueError(f"model {model!r}: {error}") from error
        for setting, (value, reason) in self.fixed.items():
            found = settings.get(setting, value)
            if found != value:
                raise ValueError(f"model {model!r}: {setting}={found} is not supported: {reason}; leave it at {value}")
