"""A recipe's budget: the few sites that cost more than it are left in float."""

from collections.abc import Sequence

from absl import logging

from qswin.qat.ptq.verdict import Comparison, kinds
from qswin.qat.quant.quantizers import TensorQuantizer

NEARLY = 1.1  # times the KL without all sites of a kind: what is left without the few that matter


def costly_sites(comparison: Comparison, budget: float) -> tuple[str, ...]:
    """The sites to leave in float so that a model is within a budget; the fewest that a greedy search finds.

    First the kind of site is found whose absence helps the most, then as few of its sites as will do, those first that
    help the most alone. Where all of them are not enough, those stay off that give nearly all that the kind can give,
    and the next kind is looked for.

    Args:
        comparison: of a calibrated model.
        budget: the largest mean KL from the float model.

    Returns:
        The sites, for `leave_in_float`; their quantizers are off.
    """
    left: list[str] = []
    groups = kinds(comparison.model)
    before = comparison.measure().kl
    while groups and not before <= budget:
        costs = {kind: comparison.without(group).kl for kind, group in groups.items()}
        kind = min(costs, key=lambda kind: costs[kind])
        target = max(budget, NEARLY * costs[kind])
        sites = _by_site(groups.pop(kind))
        order = sorted(sites, key=lambda site: comparison.without(sites[site]).kl)
        chosen = order[: _fewest(comparison, [sites[site] for site in order], target)]
        for quantizer in (quantizer for site in chosen for quantizer in sites[site]):
            quantizer.disable(quiet=True)
        after = comparison.measure().kl
        count = f"{len(chosen)} of {len(sites)} sites of {kind}"
        logging.info("auto: %s in float, KL %.4g, was %.4g", count, after, before)
        left, before = left + chosen, after
    return tuple(left)


def _by_site(group: Sequence[TensorQuantizer]) -> dict[str, list[TensorQuantizer]]:
    sites: dict[str, list[TensorQuantizer]] = {}
    for quantizer in group:
        sites.setdefault(quantizer.recipe_site, []).append(quantizer)
    return sites


def _fewest(comparison: Comparison, groups: list[list[TensorQuantizer]], target: float) -> int:
    """How many of the first groups must be off for a KL of at most `target`, by bisection; all where that takes all."""
    low, high = 0, len(groups)  # too few, enough if any number is
    while high - low > 1:
        middle = (low + high) // 2
        enough = comparison.without([quantizer for group in groups[:middle] for quantizer in group]).kl <= target
        low, high = (low, middle) if enough else (middle, high)
    return high
