"""Mixed precision: which sites stay in float so that a budget holds.

Greedy: sites leave quantization in the order of what they cost in accuracy (their KL, from the sensitivity report) for
each bit operation that quantizing them saves. A budget on accuracy takes the fewest that meet it, one on operations or
on measured latency as many as fit.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from absl import logging
from torch import nn

from qswin.calib.files import check_suffix, write_atomic
from qswin.calib.messages import text_of
from qswin.calib.validation import shown
from qswin.qat.checkpoint import Description
from qswin.qat.distributed import process_group
from qswin.qat.mixed_precision.bit_operations import bit_operations
from qswin.qat.mixed_precision.latency import latencies
from qswin.qat.mixed_precision.probe import Probe, ProbeImages, draw_probe, group_quantizers, open_probe, probe_facts
from qswin.qat.mixed_precision.sensitivity import read_report
from qswin.qat.plan import plan_text
from qswin.qat.quant.recipe import Recipe, Rule
from qswin.trt.evaluation.evaluate import main_metric

COSTS = ("bops", "latency")  # budgets that sites in float use up; the others are on accuracy
SUFFIXES = (".yaml", ".yml")  # of recipes


class Budget(NamedTuple):
    """`name` <= `limit`. kl and <metric>_drop are accuracy; bops is bit operations, as a share of the float model's;
    latency is milliseconds of a batch.
    """

    name: str
    limit: float


def parse_budget(text: str, metric: str = r"\w+") -> Budget:
    """A budget such as "acc1_drop<=0.1".

    Args:
        metric: the task's, or a pattern of it.

    Raises:
        ValueError: it is not of kl, bops, latency or the metric's drop, or its limit is infinite.
    """
    number = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
    match = re.fullmatch(rf"\s*({metric}_drop|kl|bops|latency)\s*<=\s*({number})\s*", text)
    if match is None or not math.isfinite(limit := float(match[2])):
        drop = f"{metric}_drop" if metric.isidentifier() else "acc1_drop"
        known = ", ".join(f"{name}<=NUMBER" for name in (drop, "kl", "bops", "latency"))
        raise ValueError(f"--budget {shown(text)}: give one of {known}")
    return Budget(match[1], limit)


def budget_of(text: str, metric: str, images: int, unlabelled: str | None) -> Budget:
    """A budget that can be measured on so many images. Says so where one image decides it.

    Args:
        metric: the task's.
        unlabelled: why the images have no labels; None where they have.

    Raises:
        ValueError: see `parse_budget`; or it needs labels, and there are none.
    """
    budget = parse_budget(text, metric)
    if unlabelled and budget.name.endswith("_drop"):
        raise ValueError(f"--budget {shown(text)}: needs labels, but {unlabelled}; give kl<=NUMBER")
    if budget.name == "acc1_drop" and 0 < budget.limit < 100 / images:
        step = f"one image of {images} is {100 / images:.3g} points of Acc@1"
        logging.warning("--budget %s is finer than one image: %s; take more --images, or kl<=NUMBER", text, step)
    return budget


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a budget on latency is measured: the runtime, the batch size, and TensorRT's timing cache."""

    runtime: str = "onnxruntime"
    batch_size: int = 1
    timing_cache: Path = Path("timing.cache")


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


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        groups: first those that stay in float, of which there are `floats`.
        budget: on accuracy, it needs that many in float; else it allows no more.
    """

    recipe: Recipe
    groups: list[Candidate]
    floats: int
    budget: Budget

    @property
    def share(self) -> float:
        """Bit operations as a share of the float model's."""
        return share_of_operations(self.groups, self.floats)

    def to_dict(self) -> dict[str, Any]:
        names = [group.name for group in self.groups]
        return {
            "in_float": names[: self.floats],
            "quantized": names[self.floats :],
            "share_of_bit_operations": self.share,
        }

    def __str__(self) -> str:
        first = f"{self.sentence()}; {self.share:.3f} of the float model's bit operations"
        return text_of([first, *(f"  {group.name}  (KL {group.kl:.4g})" for group in self.groups[: self.floats])])

    def sentence(self) -> str:
        """What the budget costs, or allows."""
        verb = "can" if self.budget.name in COSTS else "has to" if self.floats < 2 else "have to"
        number = "no group" if not self.floats else f"{self.floats} of {len(self.groups)} groups"
        return f"{number} {verb} stay in float for {self.budget.name}<={self.budget.limit:g}"


def search_recipe(
    checkpoint: Path, images: ProbeImages, sensitivity: Path, budget: str, target: Target, device: str = "auto"
) -> Found:
    """Finds which sites of a calibrated checkpoint stay in float for a budget.

    Args:
        sensitivity: the report that `qswin sensitivity` wrote for this checkpoint.
        budget: such as "acc1_drop<=0.1"; see `parse_budget`.

    Raises:
        ValueError: the report is another checkpoint's, the budget is malformed or cannot be met.
    """
    parse_budget(budget)  # of any task, before the work begins
    report = read_report(sensitivity)
    with process_group(device) as ranks:
        probe = open_probe(checkpoint, images, str(ranks.device))
        check_same_checkpoint(report, sensitivity, checkpoint, probe.sha256)
        description = probe.description
        assert description.recipe is not None  # the probe has quantizers
        reference = probe.measure([])
        limit = budget_of(budget, probe.metric, sum(len(batch.labels) for batch in probe.batches), probe.unlabelled)
        image = torch.from_numpy(probe.batches[0].images[:1]).to(ranks.device)
        groups = candidates(report, bit_operations(probe.model, image))
        if limit.name in COSTS:
            floats = most_in_float(cost_of(limit, probe.model, description, groups, target), limit, len(groups))
        else:
            floats = least_in_float(probe, groups, limit, reference)
    return Found(mixed_recipe(description.recipe, groups, floats), groups, floats, limit)


def plan_search(
    checkpoint: Path, images: ProbeImages, sensitivity: Path, budget: str, outputs: list[Path], device: str
) -> str:
    """What `search_recipe` would do. All that it reads is checked, and nothing is written. Raises as it does."""
    parse_budget(budget)
    report = read_report(sensitivity)
    with process_group(device) as ranks:
        drawn = draw_probe(checkpoint, images)
        facts = probe_facts(drawn, checkpoint, images, str(report["job"].get("by", "site")), ranks.device)
    check_same_checkpoint(report, sensitivity, checkpoint, drawn.loaded.sha256)
    metric = next(iter(main_metric(drawn.loaded.description.task, ()).headline))
    limit = budget_of(budget, metric, len(drawn.samples), drawn.unlabelled)
    return plan_text("search", facts | {"budget": f"{limit.name}<={limit.limit:g}"}, outputs)


def check_same_checkpoint(report: dict[str, Any], sensitivity: Path, checkpoint: Path, sha256: str) -> None:
    """Raises ValueError for a report of another checkpoint."""
    if report["job"].get("checkpoint") != sha256:
        raise ValueError(f"{sensitivity}: of another checkpoint than {checkpoint}; run qswin sensitivity on it")


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Writes a recipe as YAML, for `recipe=FILE`. Raises ValueError unless the name ends in .yaml or .yml."""
    check_suffix("--recipe", path, SUFFIXES)
    write_atomic(path, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())


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
    budget: Budget, model: nn.Module, description: Description, groups: list[Candidate], target: Target
) -> Callable[[int], float]:
    """What a budget limits, of a number of groups in float."""
    if budget.name == "bops":
        return functools.partial(share_of_operations, groups)
    sites = [group.sites for group in groups]
    return latencies(model, description, sites, target.runtime, target.batch_size, target.timing_cache)


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
