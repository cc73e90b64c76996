"""A model's blocks, and what flows through them: what block-wise methods work on."""

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from qswin.qat.quant.layers import QuantAdd

Arguments = tuple[Any, ...]  # of a block's forward: the tokens first


@dataclasses.dataclass(frozen=True)
class Fold:
    """A layer and the parameters that make the channels of its input, so that they can be scaled there.

    A twin that has some gives them out by a method `folds() -> list[Fold]`.

    Args:
        producers: detached parameters, or parts of them, whose first dimension is the channels that the layer reads.
    """

    layer: nn.Module
    producers: tuple[Tensor, ...]


def behind_norm(norm: Any, layer: Any) -> list[Fold]:
    """The fold of a layer that alone reads what a normalization gives; none where that is not a LayerNorm's."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return []
    return [Fold(layer, (norm.weight.detach(), norm.bias.detach()))]


def behind_values(qkv: Any, v_bias: Tensor | None, proj: nn.Module) -> list[Fold]:
    """The fold of an attention's projection: v's channels come from the last third of the rows of qkv."""
    rows = qkv.weight.detach().chunk(3)[2]
    return [Fold(proj, (rows,) if v_bias is None else (rows, v_bias.detach()))]


class FoldingBlock(nn.Module):
    """A block that computes something which does not depend on its input, and can turn that into a constant."""

    def fold(self) -> None:
        """Computes it once, for inference: an exported graph then holds a constant instead."""
        raise NotImplementedError

    def fix_size(self, height: int, width: int) -> None:
        """Takes inputs of one size from now on, (B, height, width, C), where the block took any."""
        raise NotImplementedError


class _Reached(Exception):
    """The forward has come to the block that was asked for."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order: the modules that have residual adds."""
    return [module for module in model.modules() if any(isinstance(child, QuantAdd) for child in module.children())]


class BlockOutputs:
    """Records the output of each block of a model, with its gradient, until it is taken; not that of a copy's."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[Tensor] = []
        recorded = set(blocks(model))

        def record(block: nn.Module, arguments: Arguments, output: Tensor) -> None:
            if block in recorded:  # a copy of the model shares this function; a bound method would be copied too
                self._outputs.append(output)

        for block in recorded:
            block.register_forward_hook(record)

    def take(self) -> list[Tensor]:
        """The outputs since the last call, in order."""
        taken, self._outputs = self._outputs, []
        return taken


@torch.no_grad()
def input_sizes(model: nn.Module, modules: Collection[nn.Module], image: Tensor) -> dict[nn.Module, tuple[int, int]]:
    """(H, W) of what some of a model's modules get, (B, H, W, C), when it sees an image (1, 3, H, W)."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, arguments: Arguments) -> None:
        sizes[module] = (arguments[0].shape[1], arguments[0].shape[2])

    handles = [module.register_forward_pre_hook(record) for module in modules]
    model(image)
    for handle in handles:
        handle.remove()
    return sizes


def fix_size(model: nn.Module, image: Tensor) -> None:
    """Makes constants of all that depends on the image's size, in place: the model takes such images only."""
    found = [module for module in model.modules() if isinstance(module, FoldingBlock)]
    for block, (height, width) in input_sizes(model, found, image).items():
        cast(FoldingBlock, block).fix_size(height, width)


@torch.no_grad()
def block_arguments(model: nn.Module, block: nn.Module, batch: Tensor) -> Arguments:
    """The arguments of a block when the model sees a batch."""
    found: list[Arguments] = []

    def stop(_: nn.Module, arguments: Arguments) -> None:
        found.append(arguments)
        raise _Reached

    _run_to(model, block.register_forward_pre_hook(stop), batch)
    return found[0]


@torch.no_grad()
def block_output(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    """The output of a block when the model sees a batch."""
    found: list[Tensor] = []

    def stop(_: nn.Module, arguments: Arguments, output: Tensor) -> None:
        found.append(output)
        raise _Reached

    _run_to(model, block.register_forward_hook(stop), batch)
    return found[0]


def _run_to(model: nn.Module, handle: Any, batch: Tensor) -> None:
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
