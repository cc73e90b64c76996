"""What a model predicts, as a distribution: classes by its logits, or feature maps, as the means of Gaussians.

So Fisher information and KL divergence are defined for classifiers, segmentors and backbones alike. All values of a
feature map have one standard deviation, that of a normal distribution with the map's median magnitude: unlike the
values' own, it does not grow with a few massive ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = "logits"
MEDIAN = 0.6745  # of the magnitudes of a standard normal distribution
SMALLEST = 0.01  # of the root mean square: the standard deviation of a map that is 0 in most places
NEAR = 0.5  # standard deviations between values that agree
MOST_VALUES = 1 << 20  # of a map, that its median is taken of
Outputs = dict[str, Tensor]


def named_outputs(output: Any) -> Outputs:
    """The tensors of what a model returned, by name.

    Args:
        output: a tensor, which is logits; a mapping of names to feature maps; a tuple or list of feature maps, named
            "feature0" and so on; or an object that has a list of them as `feature_maps`, as transformers' backbones.

    Raises:
        ValueError: it is something else.
    """
    output = getattr(output, "feature_maps", output)
    if isinstance(output, Tensor):
        return {LOGITS: output}
    maps = output if isinstance(output, Mapping) else None
    if isinstance(output, tuple | list):
        maps = {f"feature{index}": each for index, each in enumerate(output)}
    if not maps or not all(isinstance(each, Tensor) for each in maps.values()):
        what = "give logits, or a list or dict of feature maps"
        raise ValueError(f"the model returns a {type(output).__name__}; {what}")
    return dict(maps)


def drawn_likelihood(outputs: Outputs, draws: int) -> list[Tensor]:
    """Log likelihoods of predictions that are drawn from the distribution itself, but for what does not depend on it.

    Args:
        outputs: of a model, whose gradients are wanted.
        draws: how many.

    Returns:
        A scalar for each draw, the sum over all images.
    """
    if LOGITS in outputs:
        logits = outputs[LOGITS]
        classes = torch.distributions.Categorical(logits=logits.detach().movedim(1, -1))
        return [-F.cross_entropy(logits, classes.sample(), reduction="sum") for _ in range(draws)]
    scales = {name: deviation(each.detach()) for name, each in outputs.items()}
    return [
        torch.stack([(each * torch.randn_like(each)).sum() / scales[name] for name, each in outputs.items()]).sum()
        for _ in range(draws)
    ]


def deviation(values: Tensor) -> Tensor:
    """The standard deviation, (), that all values of a feature map are said to have; see above."""
    magnitudes = values.abs().flatten()
    median = magnitudes[:: -(-len(magnitudes) // MOST_VALUES)].median()
    return torch.maximum(median / MEDIAN, SMALLEST * values.square().mean().sqrt()).clamp(min=1e-30)


def divergence(ours: Outputs, reference: Outputs) -> Tensor:
    """KL(reference || ours): of each image or pixel, from logits (N, classes, ...); or of each value of the maps."""
    if LOGITS in reference:
        logs = F.log_softmax(reference[LOGITS], 1)
        return (logs.exp() * (logs - F.log_softmax(ours[LOGITS], 1))).sum(1)
    return torch.cat(
        [((ours[name] - each) / deviation(each)).square().flatten() / 2 for name, each in reference.items()]
    )


def agreement(ours: Sequence[Outputs], reference: Sequence[Outputs]) -> float:
    """In per cent, over batches: how often both give the same class; of masks, the mean Dice of both; of feature maps,
    how many values are nearer to each other than half a standard deviation."""
    if LOGITS in reference[0]:
        classes = (torch.cat([each[LOGITS].argmax(1) for each in side]) for side in (ours, reference))
        return _of_classes(*classes)
    pairs = [(one[name], each) for one, other in zip(ours, reference, strict=True) for name, each in other.items()]
    near = [((one - other).abs() < NEAR * deviation(other)).double().mean() for one, other in pairs]
    return float(100 * torch.stack(near).mean())


def _of_classes(ours: Tensor, reference: Tensor) -> float:
    """Of classes (N,), or masks (N, H, W)."""
    if ours.ndim == 1:
        return float(100 * (ours == reference).double().mean())
    classes = torch.cat((ours, reference)).unique()
    sizes = [((ours == c).sum() + (reference == c).sum(), ((ours == c) & (reference == c)).sum()) for c in classes]
    return float(100 * torch.stack([2 * both / size for size, both in sizes]).double().mean())
