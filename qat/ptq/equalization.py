"""Channel equalization: factors between an activation's channels and the next weight, so that one range suits them all.

A layer computes (x * s) @ (W / s).T in place of x @ W.T, as in Xiao et al., "SmoothQuant", ICML 2023, section 4. The
factors and their search are those of Lin et al., "AWQ", MLSys 2024, section 3.2: s is the channel's largest magnitude
to the power of -strength. Each layer has the strength whose quantization changes the output of its block the least,
each element of the output weighted by what it matters to the prediction (qat/ptq/fisher.py): in plain squared error,
the few tokens with massive activations would outweigh all others.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from qswin.qat.ptq.few_images import batches_of
from qswin.qat.ptq.fisher import squared_gradients
from qswin.qat.ptq.ranks import reduced
from qswin.qat.quant.blocks import Arguments, Fold, block_arguments, blocks
from qswin.qat.quant.layers import QuantConv2d, QuantLinear, channel_shape, scale_channels, undo_channel_scales
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import disable

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST_CHANNELS = 8  # an image's three need no factors
TRIAL_IMAGES = 32  # five passes over a block for each of its layers
TRIAL_BATCH = 16  # of these: what a pass and its gradients hold at a time
DRAWS = 4  # of classes an image, for the Fisher weights
SPREAD = 1e4  # of a layer's factors, at most: a channel that is never used would get an infinite one
Layer = Any  # QuantLinear or QuantConv2d


@torch.no_grad()
def equalize(model: nn.Module, batches: Sequence[Tensor], seed: int = 0) -> dict[str, float]:
    """Scales the channels that layers read, in place. In float, the model computes what it did.

    A twin says what can take a layer's factors over (`Fold`). Where nothing can, they stay before the layer's
    quantizer, as `_pre_quant_scale`. The quantizers are off afterwards, and the ranges of layers must be found anew.

    Args:
        model: made by `quantize`.
        batches: (N, 3, H, W) each, on the model's device. Strengths are tried on the first images. Under
            torch.distributed all ranks pass the same.
        seed: of the classes that are drawn for the weights of errors. The caller's random numbers go on as if nothing
            had been drawn.

    Returns:
        {site: strength} of the layers whose inputs and weights are quantized; 0 where scaling does not help.
    """
    disable(model, quiet=True)
    strengths: dict[str, float] = {}
    undo_channel_scales(model)
    layers = equalizable(model)
    amax = channel_amax(model, layers, batches) if layers else {}
    reached = [layer for layer in layers if amax[layer].any()]
    if not reached:
        return strengths
    images = batches_of((image for batch in batches for image in batch), TRIAL_IMAGES, TRIAL_BATCH)
    groups = _by_block(model, reached)
    weights = _error_weights(model, [block for block, _ in groups], images, seed)
    for block, layers in tqdm(groups, "equalize", disable=not sys.stderr.isatty()):
        examples = [
            (block_arguments(model, block, part), each[block]) for part, each in zip(images, weights, strict=True)
        ]
        for layer in layers:
            trial = Trial(block, layer, examples)
            site, largest = layer._input_quantizer.site, amax[layer]
            errors = torch.stack([trial.error(channel_factors(largest, strength)) for strength in STRENGTHS])
            strengths[site] = STRENGTHS[int(reduced(errors, dist.ReduceOp.SUM).argmin())]
            trial.settle(channel_factors(largest, strengths[site]))
    _fold(model)
    return strengths


def equalizable(model: nn.Module) -> list[Layer]:
    """The layers with quantized inputs and weights that gain from it.

    Left out are those that read an image, those that share their weight, and those whose inputs are of a format that
    holds large and small values side by side.
    """
    layers = [module for module in model.modules() if type(module) in (QuantLinear, QuantConv2d)]
    owners = [layer.weight for layer in layers]
    return [layer for layer in layers if _is_equalizable(layer) and sum(layer.weight is w for w in owners) == 1]


def _is_equalizable(layer: Layer) -> bool:
    pair = (layer._input_quantizer, layer._weight_quantizer)
    quantized = all(isinstance(each, TensorQuantizer) for each in pair)
    return quantized and pair[0].spec.grid.even and channel_shape(layer)[0] >= FEWEST_CHANNELS


def channel_amax(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor]) -> dict[Layer, Tensor]:
    """The largest magnitude of each channel that a layer reads, of `channel_shape`; over all ranks."""
    found = {layer: layer.weight.new_zeros(channel_shape(layer)[0]) for layer in layers}

    def record(layer: Layer, arguments: Arguments) -> None:
        x = arguments[0].abs()
        amax = x.amax((0, 2, 3)) if isinstance(layer, QuantConv2d) else x.flatten(0, -2).amax(0)
        found[layer] = torch.maximum(found[layer], amax)

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: reduced(found[layer], dist.ReduceOp.MAX).view(channel_shape(layer)) for layer in layers}


def channel_factors(amax: Tensor, strength: float) -> Tensor | None:
    """amax ** -strength, with a geometric mean of 1, so that weights keep their magnitude; None where all are 1."""
    if strength == 0:
        return None
    logs = -strength * amax.clamp(min=float(amax.max()) / SPREAD).log()
    return (logs - logs.mean()).exp()


def _by_block(model: nn.Module, layers: list[Layer]) -> list[tuple[nn.Module, list[Layer]]]:
    """Each block with its layers; a layer outside of blocks stands for a block of its own."""
    groups = [(block, [module for module in block.modules() if module in layers]) for block in blocks(model)]
    inside = {layer for _, members in groups for layer in members}
    return [group for group in groups if group[1]] + [(layer, [layer]) for layer in layers if layer not in inside]


def _error_weights(
    model: nn.Module, modules: list[nn.Module], batches: Sequence[Tensor], seed: int
) -> list[dict[nn.Module, Tensor]]:
    """For each batch {module: Fisher weights of its output}; 1 where all are 0, as with a single class."""
    with torch.random.fork_rng([batches[0].device] if batches[0].is_cuda else []):
        torch.manual_seed(seed)
        found = [dict(zip(modules, squared_gradients(model, modules, part, DRAWS), strict=True)) for part in batches]
    for module in modules:
        if not sum(float(weights[module].sum()) for weights in found) > 0:
            for weights in found:
                weights[module] = torch.ones_like(weights[module])
    return found


class Trial:
    """A layer of a block, quantized with one set of factors after another, all else in float.

    Args:
        examples: of each batch the block's arguments, and the weights of the squared errors of its output.
    """

    def __init__(self, block: nn.Module, layer: Layer, examples: Sequence[tuple[Arguments, Tensor]]) -> None:
        self.block, self.layer, self.examples = block, layer, examples
        self.weight = layer.weight.detach().clone()
        self.inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, arguments: self.inputs.append(arguments[0]))
        self.targets = [block(*arguments) for arguments, _ in examples]
        handle.remove()

    def error(self, factors: Tensor | None) -> Tensor:
        """(), float64: the weighted squared error of the block's output, with ranges from the recipe's calibrators."""
        self._set(factors)
        taken, weighed = self.layer._input_quantizer, self.layer._weight_quantizer
        taken.observe(quiet=True)
        for x in self.inputs:
            taken(x)
        taken.set_range_from_histogram()
        weighed.set_range_from_weight(self.layer.weight)
        for quantizer in (taken, weighed):
            quantizer._amax[quantizer._amax == 0] = 1.0  # of zeros alone; find_ranges will see to them
            quantizer.enable()
        pairs = zip(self.examples, self.targets, strict=True)
        errors = [weights * (self.block(*arguments) - target).square() for (arguments, weights), target in pairs]
        error = torch.stack([each.sum().double() for each in errors]).sum()
        for quantizer in (taken, weighed):
            quantizer.disable(quiet=True)
        return error

    def settle(self, factors: Tensor | None) -> None:
        """Leaves the layer with these factors and without ranges."""
        self._set(factors)
        for quantizer in quantizers(self.layer):
            quantizer._amax.fill_(float("nan"))
            quantizer.disable(quiet=True)

    def _set(self, factors: Tensor | None) -> None:
        self.layer._input_quantizer._pre_quant_scale = factors
        weight = self.weight if factors is None else scale_channels(self.layer, self.weight, 1 / factors)
        self.layer.weight.data.copy_(weight)


def _fold(model: nn.Module) -> None:
    """Moves factors into what comes before the layers, where twins say how."""
    for module in model.modules():
        folds = getattr(module, "folds", None)
        for fold in () if folds is None else folds():
            _take_over(fold)


def _take_over(fold: Fold) -> None:
    quantizer = getattr(fold.layer, "_input_quantizer", None)
    if not isinstance(quantizer, TensorQuantizer) or quantizer._pre_quant_scale is None:
        return
    for producer in fold.producers:
        producer.mul_(quantizer._pre_quant_scale.view(-1, *[1] * (producer.ndim - 1)))
    quantizer._pre_quant_scale = None
