"""Mixed precision: which sites stay in float so that a budget holds. The command `qswin search`; it writes a recipe file.

Greedy: sites leave quantization in the order of what they cost in accuracy (their KL, from `qswin sensitivity`) for each bit
operation that quantizing them saves. A budget on accuracy takes the fewest that meet it, one on operations or on measured
latency as many as fit.
"""

import argparse
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor, nn

from qswin.qat.checkpoint import Description
from qswin.qat.mixed_precision.latency import latencies
from qswin.qat.mixed_precision.sensitivity import Probe, group_quantizers
from qswin.qat.quant.layers import QuantAdd, QuantConv2d, QuantLinear, QuantMatMul
from qswin.qat.quant.quantizers import TensorQuantizer
from qswin.qat.quant.recipe import Recipe, Rule

FLOAT_BITS = 16  # of a site that is not quantized


class Budget(NamedTuple):
    """`name` <= `limit`. kl and <metric>_drop are accuracy; bops is bit operations, as a share of the float model's; latency
    is milliseconds of a batch.
    """

    name: str
    limit: float


def parse_budget(text: str, metric: str) -> Budget:
    """A budget such as "acc1_drop<=0.1". Raises ValueError unless it is of kl, bops, latency or the task's metric."""
    match = re.fullmatch(r"\s*(\w+)\s*<=\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*", text)
    known = (f"{metric}_drop", "kl", "bops", "latency")
    if match is None or match[1] not in known:
        raise ValueError(f"--budget {text!r}: give one of {', '.join(f'{name}<=NUMBER' for name in known)}")
    return Budget(match[1], float(match[2]))


def bit_operations(model: nn.Module, image: Tensor) -> dict[str, tuple[float, float]]:
    """(quantized, in float) bit operations of each site for one image: multiply-adds times the bits of both factors.

    A matmul's are halved between its two inputs, and each element of a residual add's branch counts as one operation of its
    bits.

    Args:
        image: (1, 3, H, W).
    """
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for quantizer, operations, bits in _operations(layer, inputs, output):
            site = quantizer.site.removesuffix(".weight")
            counts[site][0] += operations * bits
            counts[site][1] += operations * (FLOAT_BITS if isinstance(layer, QuantAdd) else FLOAT_BITS**2)

    kinds = (QuantLinear, QuantConv2d, QuantMatMul, QuantAdd)
    handles = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, kinds)]
    try:
        with torch.inference_mode():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return {site: (quantized, floating) for site, (quantized, floating) in counts.items()}


def _operations(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> list[tuple[TensorQuantizer, float, int]]:
    """(quantizer, operations, bits of both factors) of each site of a layer."""
    first: Any = layer._input_quantizer
    second: Any = layer._weight_quantizer if isinstance(layer, QuantLinear | QuantConv2d) else layer._other_quantizer
    both = [q for q in (first, second) if isinstance(q, TensorQuantizer)]
    bits = [q.spec.grid.bits if isinstance(q, TensorQuantizer) else FLOAT_BITS for q in (first, second)]
    if isinstance(layer, QuantAdd):
        return [(q, float(output.numel()), q.spec.grid.bits) for q in both]
    if isinstance(layer, QuantMatMul):
        return [(q, output.numel() * inputs[0].shape[-1] / 2, bits[0] * bits[1]) for q in both]
    weight: Any = layer.weight
    return [(q, output.numel() * weight[0].numel(), bits[0] * bits[1]) for q in both[:1]]


class Candidate(NamedTuple):
    """A group of sites that stays in float, or is quantized, as one."""

    name: str
    sites: list[str]
    kl: float
    quantized: float  # bit operations
    floating: float


def candidates(report: dict[str, Any], operations: dict[str, tuple[float, float]]) -> list[Candidate]:
    """The groups of a sensitivity report, first what costs most accuracy for each bit operation saved."""
    found = []
    for row in report["rows"]:
        quantized, floating = (sum(operations[site][i] for site in row["sites"]) for i in (0, 1))
        found.append(Candidate(row["name"], row["sites"], row["alone"]["kl"], quantized, floating))
    return sorted(found, key=lambda group: -group.kl / (group.floating - group.quantized))


def share_of_operations(groups: list[Candidate], floats: int) -> float:
    """Bit operations with the first `floats` groups in float, as a share of those with all in float."""
    used = sum(group.floating if i < floats else group.quantized for i, group in enumerate(groups))
    return used / sum(group.floating for group in groups)


def fewest(meets: Callable[[int], bool], most: int) -> int:
    """The smallest count of 0..most that meets a condition, by bisection: it is taken to hold for all larger ones.

    Raises:
        ValueError: not even `most` does.
    """
    if not meets(most):
        raise ValueError("the budget cannot be met, even with every site in float")
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return low


def most_in_float(cost: Callable[[int], float], budget: Budget, count: int) -> int:
    """How many of `count` groups can stay in float: all, or else as many as bisection finds for a cost that rises.

    Args:
        cost: of a number of groups in float.

    Raises:
        ValueError: the cost is above the limit with all of them and with none.
    """
    if cost(count) <= budget.limit:  # also where INT8 is the slower one
        return count
    if cost(0) > budget.limit:
        found = f"{cost(0):.3f} with every site quantized, {cost(count):.3f} with none"
        raise ValueError(f"the budget cannot be met: {budget.name} is {found}")
    return fewest(lambda n: n == count or cost(n) > budget.limit, count) - 1


def cost_of(
    budget: Budget, model: nn.Module, description: Description, groups: list[Candidate], args: argparse.Namespace
) -> Callable[[int], float]:
    """What a budget limits, of a number of groups in float."""
    if budget.name == "bops":
        return functools.partial(share_of_operations, groups)
    sites = [group.sites for group in groups]
    return latencies(model, description, sites, args.runtime, args.batch, args.recipe.with_name("timing.cache"))


def least_in_float(probe: Probe, groups: list[Candidate], budget: Budget, reference: dict[str, float]) -> int:
    """How many of the groups must stay in float for a budget on accuracy.

    Args:
        reference: the float model's metrics.

    Raises:
        ValueError: the budget cannot be met.
    """
    by_site = group_quantizers(probe.model, "site")

    def meets(floats: int) -> bool:
        kept = [quantizer for group in groups[floats:] for site in group.sites for quantizer in by_site[site]]
        measured = probe.measure(kept)
        metric = budget.name.removesuffix("_drop")
        loss = measured["kl"] if metric == "kl" else reference[metric] - measured[metric]
        logging.info("%d of %d groups in float: %s lost %.6g", floats, len(groups), metric, loss)
        return loss <= budget.limit

    return fewest(meets, len(groups))


def mixed_recipe(recipe: Recipe, groups: list[Candidate], floats: int) -> Recipe:
    """The recipe with the first `floats` groups left in float, and without rules for what this model has not."""
    sites = [site for group in groups for site in group.sites]
    rules = [rule for rule in recipe.rules if any(map(rule.matches, sites))]
    rules += [Rule(site, quantize=False) for group in groups[:floats] for site in group.sites]
    return dataclasses.replace(recipe, name=f"{recipe.name}-mixed", rules=tuple(rules))
