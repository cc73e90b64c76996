"""Post-training quantization: all that can be done for a model with images alone, without training and labels."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from qswin.qat.ptq.automatic import costly_sites
from qswin.qat.ptq.bias_correction import correct_biases
from qswin.qat.ptq.choose_calibrators import choose_calibrators
from qswin.qat.ptq.equalization import equalize
from qswin.qat.ptq.few_images import batches_of
from qswin.qat.ptq.massive import leave_massive_adds
from qswin.qat.ptq.ranges import check_count, find_ranges, image_tensors
from qswin.qat.ptq.ranks import gathered, of_first_rank
from qswin.qat.ptq.reconstruction import reconstruct
from qswin.qat.ptq.verdict import Comparison
from qswin.qat.quant.rewrite import leave_in_float, recipe_of
from qswin.qat.schema import CalibrationConfig

FEW_IMAGES = 64  # for what needs many passes: equalization, and the sites that cost too much
BATCH = 32  # of these


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    options: CalibrationConfig | None = None,
    dead_range: float | None = None,
    seed: int = 0,
) -> int:
    """Calibrates a model that `quantize` made and switches its quantizers on.

    Sites may be left in float: residual adds with massive activations, and those that cost more than the recipe's
    budget. `model.recipe`, which describes the model from then on, names them as `in_float`.

    Args:
        batches: (N, 3, H, W) images each, or tuples or lists that begin with such a tensor, as a DataLoader of
            (images, labels) gives. They are moved to the model's device.
        options: the section `calibration` of a config. Its number of images, its batch size and what goes over the
            recipe's are the caller's matter.
        dead_range: stands in for ranges that come out as 0.
        seed: of the random numbers that equalization and reconstruction draw.

    Returns:
        The number of images seen by this rank.

    Raises:
        ValueError: a batch is something else; there were no images; or a range is dead and `dead_range` is None, whose
            site is named.
    """
    options, budget = options or CalibrationConfig(), recipe_of(model).budget
    images = image_tensors(model, batches)
    first = list(_first(images, FEW_IMAGES))
    check_count(model, len(first))
    few = batches_of(gathered([image for batch in first for image in batch][:FEW_IMAGES]), FEW_IMAGES, BATCH)
    if options.equalize:
        equalize(model, few, seed)
    again = needs_images_again(options)
    kept = [*first, *images] if again else itertools.chain(first, images)
    total = find_ranges(model, kept, dead_range)
    leave_massive_adds(model)
    if again:
        _refine(model, list(kept), options, seed)
    if budget is not None:
        leave_in_float(model, of_first_rank(lambda: costly_sites(Comparison(model, few), budget)))
    return total


def _first(batches: Iterator[Tensor], images: int) -> Iterator[Tensor]:
    """The first batches that hold so many images together."""
    while images > 0 and (batch := next(batches, None)) is not None:
        yield batch
        images -= len(batch)


def _refine(model: nn.Module, batches: Sequence[Tensor], options: CalibrationConfig, seed: int) -> None:
    if options.choose_calibrators:
        choose_calibrators(model, batches[:2])  # hundreds of passes over each block: a few dozen images must do
    if options.correct_biases:
        correct_biases(model, batches[:4])  # a mean needs few images, and each layer is a pass
    if options.reconstruct_steps:
        rates = options.reconstruct_lr, options.reconstruct_range_lr
        reconstruct(model, batches, options.reconstruct_steps, *rates, seed)


def needs_images_again(options: CalibrationConfig) -> bool:
    """Whether more is asked for than what one pass over all images finds."""
    return options.choose_calibrators or options.correct_biases or options.reconstruct_steps > 0
