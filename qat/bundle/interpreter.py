"""A bundle run on the CPU: its launches over one workspace, each kernel being its reference in plain torch.

It shows that places, lifetimes and the order of launches are right. Cubins are not run.
"""

from typing import Any

import torch
from torch import Tensor

from qswin.qat.bundle.assemble import SCRATCH, specialize, stored
from qswin.qat.bundle.contents import Batch, Bundle, Call, Launch, TensorAt, buffer_of, space_sizes
from qswin.qat.kernels import (  # noqa: F401  # they register their operators and plans
    attention,
    layer_norm,
    linear,
    norm_add,
    norm_quantize,
    patch_embed,
    pool_quantize,
)
from qswin.qat.kernels.launch import PLANS

GARBAGE = 0xA5  # what the workspace is filled with: a kernel that reads what none has written gives nonsense


def interpret(bundle: Bundle, images: Tensor) -> Tensor:
    """The logits (N, classes) float32 of images (N, C, H, W) float32, N being one of the bundle's batch sizes.

    Raises:
        ValueError: the bundle has no such batch, or its launches are not those that its manifest describes.
    """
    index = next((i for i, batch in enumerate(bundle.batches) if batch.size == len(images)), None)
    if index is None:
        raise ValueError(f"batch {len(images)}: the bundle has {', '.join(str(b.size) for b in bundle.batches)}")
    batch = bundle.batches[index]
    memory = _Memory(bundle, batch)
    memory.spaces["input"].view(torch.float32).copy_(images.reshape(-1))
    for launch, call in zip(batch.launches, bundle.manifest.calls[index], strict=True):
        _run(bundle, memory, launch, call)
    return memory.spaces["output"].view(torch.float32).view(batch.size, bundle.classes).clone()


class _Memory:
    """The bytes of each space."""

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        sizes = space_sizes(bundle, batch)
        self.spaces = {space: torch.full((size,), GARBAGE, dtype=torch.uint8) for space, size in sizes.items()}
        self.spaces["constants"] = torch.frombuffer(bytearray(bundle.constants), dtype=torch.uint8)

    def tensor(self, at: TensorAt) -> Tensor:
        """A tensor that shares its memory with a space."""
        space, offset, size = buffer_of(at)
        return self.spaces[space][offset : offset + size].view(getattr(torch, at.dtype)).view(at.shape)


def _run(bundle: Bundle, memory: _Memory, launch: Launch, call: Call) -> None:
    """Runs a call by its operator's reference, once its launch is that of the operator's plan."""
    if call.operator not in PLANS:
        raise ValueError(f"{call.operator}: no operator that this qswin has; build the bundle again")
    arguments = [_argument(memory, argument) for argument in call.arguments]
    plan = PLANS[call.operator](*arguments)
    kernel, values = specialize(plan)
    buffers = {
        id(a): buffer_of(at) for a, at in zip(arguments, call.arguments, strict=True) if isinstance(at, TensorAt)
    }
    buffers[id(plan.out)] = buffer_of(call.result)
    planned = [buffers[id(v)] if isinstance(v, Tensor) else stored(v) for v in values]
    if (kernel, (*planned, *SCRATCH)) != (bundle.manifest.kernels[launch.kernel], launch.arguments):
        raise ValueError(f"{call.operator}: its launch is not the one that this qswin plans; build the bundle again")
    if (*plan.grid, 1, 1)[:3] != launch.grid:
        raise ValueError(f"{call.operator}: its grid is not the one that this qswin plans; build the bundle again")
    namespace, name = call.operator.split("::")
    memory.tensor(call.result).copy_(getattr(getattr(torch.ops, namespace), name)(*arguments))


def _argument(memory: _Memory, argument: Any) -> Any:
    """An operator's argument of what the manifest says of it."""
    if isinstance(argument, TensorAt):
        return memory.tensor(argument)
    return getattr(torch, argument) if isinstance(argument, str) else argument
