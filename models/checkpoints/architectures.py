"""What a checkpoint is of, by its tensors alone. How the tensors tell it is each architecture's: recognize_*.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

from qswin.models.checkpoints.weights import Weights


@dataclasses.dataclass(frozen=True)
class Recognized:
    """What a checkpoint is of.

    Args:
        name: of the model.
        num_classes: None where the checkpoint has no head that can be had.
        settings: of the architecture, over those of the name; what the weights ask for is not among them.
        assumed: a sentence for each thing that no tensor tells.
    """

    name: str
    num_classes: int | None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()


Recognize = Callable[[Weights], Recognized]


def classes_of(weights: Weights, head: str) -> int | None:
    """How many classes the head is for, by the name of its weight, (classes, C); None without one that can be had."""
    return None if weights.headless or head not in weights.state else len(weights.state[head])
