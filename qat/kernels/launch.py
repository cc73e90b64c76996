"""What a launch of a kernel is: what an operator runs on a GPU, and what a bundle stores.

Each operator writes `wrap_triton(_its_kernel)[launch.grid](...)` itself. torch looks for the kernel by that name in the
operator's source, as a part of the key of its compile caches; `wrap_triton(launch.kernel)` would hide it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Plan = TypeVar("Plan", bound=Callable[..., "Launch"])
PLANS: dict[str, Callable[..., "Launch"]] = {}  # {operator, "qswin::linear_add": its plan}


class Launch(NamedTuple):
    """A launch, planned from shapes and dtypes alone: tensors may be on the meta device.

    Attributes:
        kernel: the Triton function.
        grid: its programs in each dimension.
        arguments: {parameter of the kernel: value}, constants too.
        options: how the kernel is compiled: num_warps, num_stages.
        out: the tensor that it writes, which is among the arguments; nothing is written to it yet.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    out: Tensor


def plans(operator: str) -> Callable[[Plan], Plan]:
    """Registers a function as the plan of an operator, of whose arguments it makes the launch."""

    def register(plan: Plan) -> Plan:
        PLANS[operator] = plan
        return plan

    return register
