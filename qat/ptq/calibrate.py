"""Post-training quantization: all that can be done for a model with images alone, without training and labels."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from qswin.qat.ptq.bias_correction import correct_biases
from qswin.qat.ptq.choose_calibrators import choose_calibrators
from qswin.qat.ptq.equalization import equalize
from qswin.qat.ptq.massive import leave_massive_adds
from qswin.qat.ptq.ranges import find_ranges, image_tensors
from qswin.qat.ptq.reconstruction import reconstruct
from qswin.qat.schema import CalibrationConfig

EQUALIZATION_BATCHES = 2


class Calibration(NamedTuple):
    images: int  # of this rank
    in_float: tuple[str, ...]  # sites of the recipe that stay in float


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    options: CalibrationConfig | None = None,
    dead_range: float | None = None,
    seed: int = 0,
) -> Calibration:
    """Calibrates a model that `quantize` made and switches its quantizers on.

    Args:
        batches: (N, 3, H, W) images each, or tuples or lists that begin with such a tensor, as a DataLoader of
            (images, labels) gives. They are moved to the model's device.
        options: the section `calibration` of a config; its number of images and its batch size are the caller's matter.
        dead_range: stands in for ranges that come out as 0.
        seed: of the reconstruction's random numbers; all else draws none.

    Returns:
        The number of images seen by this rank, and the residual adds that were left in float for their massive
        activations: what describes the model is `recipe.leaving(calibration.in_float)`.

    Raises:
        ValueError: a batch is something else; there were no images; or a range is dead and `dead_range` is None, whose
            site is named.
    """
    options = options or CalibrationConfig()
    images = image_tensors(model, batches)
    first = list(itertools.islice(images, EQUALIZATION_BATCHES))
    if options.equalize:
        equalize(model, first)
    again = needs_images_again(options)
    kept = [*first, *images] if again else itertools.chain(first, images)
    total = find_ranges(model, kept, dead_range)
    in_float = leave_massive_adds(model)
    if again:
        _refine(model, list(kept), options, seed)
    return Calibration(total, in_float)


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
