"""A lowered model as calls of our operators: it is run on the meta device, where nothing is computed."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from qswin.qat.bundle.contents import Space, TensorAt
from qswin.qat.kernels.launch import PLANS, Launch

REMEDY = "a bundle holds launches of the project's kernels only; --target inductor builds this model"


class Traced(NamedTuple):
    """A call of an operator on the meta device: its name, its arguments, and the launch that its plan makes of them."""

    operator: str
    arguments: tuple[Any, ...]
    launch: Launch


class Trace(NamedTuple):
    """What a model does with a batch.

    Attributes:
        calls: in order.
        image, logits: what the first reads and the last writes, on the meta device.
        constants: {storage of a parameter or buffer on the meta device: the tensor itself}.
    """

    calls: list[Traced]
    image: Tensor
    logits: Tensor
    constants: dict[int, Tensor]


def storage_of(tensor: Tensor) -> int:
    """The identity of what a tensor is a view of."""
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Records calls of our operators in place of running them; views are let through, and all else is refused."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Traced] = []
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in PLANS:
            launch = PLANS[name](*args, **(kwargs or {}))
            self.calls.append(Traced(name, (*args, *(kwargs or {}).values()), launch))
            self._known.add(storage_of(launch.out))
            return launch.out
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not (isinstance(out, Tensor) and storage_of(out) in self._known):
            raise ValueError(f"{func} computes, and is not one of the kernels; {REMEDY}")
        return out


def trace(lowered: nn.Module, shape: tuple[int, int, int, int]) -> Trace:
    """The calls of a model from `qswin.qat.lowering.lower.lower` for float32 images (N, C, H, W) of a shape.

    Raises:
        ValueError: it computes something that is not one of our operators (it is named), or gives something other than
            the result of one, (N, classes) in float32.
    """
    state = {name: tensor.contiguous() for name, tensor in (*lowered.named_parameters(), *lowered.named_buffers())}
    meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    image = torch.empty(shape, device="meta")
    recorder = _Recorder({storage_of(tensor) for tensor in (image, *meta.values())})
    with torch.no_grad(), recorder:
        logits = functional_call(lowered, meta, (image,))
    written = {storage_of(call.launch.out) for call in recorder.calls}
    if not (isinstance(logits, Tensor) and logits.ndim == 2 and logits.dtype == torch.float32):
        raise ValueError("the model gives no logits (N, classes) in float32: bundles are of classifiers")
    if storage_of(logits) not in written or logits.numel() != recorder.calls[-1].launch.out.numel():
        raise ValueError(f"the model's last layer is not one of the kernels; {REMEDY}")
    return Trace(recorder.calls, image, logits, {storage_of(meta[name]): tensor for name, tensor in state.items()})


def tensors_of(call: Traced) -> Iterator[Tensor]:
    """The tensors that a call reads, and the one that it writes."""
    yield from (argument for argument in call.arguments if isinstance(argument, Tensor))
    yield call.launch.out


def tensor_at(tensor: Tensor, space: Space, start: int) -> TensorAt:
    """A tensor of a storage that begins `start` bytes into a space.

    Raises:
        ValueError: it is not contiguous, as the kernels read their tensors.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor {tuple(tensor.shape)} of the model is not contiguous; {REMEDY}")
    offset = start + tensor.storage_offset() * tensor.element_size()
    return TensorAt(space, offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))  # type: ignore[arg-type]


def storage_bytes(tensor: Tensor) -> int:
    """The bytes of a contiguous tensor."""
    return math.prod(tensor.shape) * tensor.element_size()
