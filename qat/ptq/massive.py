"""Massive activations: residual adds that INT8 cannot hold, left in float.

In large pretrained transformers a few channels of the residual stream reach hundreds of times the others (Sun
et al., "Massive Activations in Large Language Models", COLM 2024, section 2). One range over such a stream has steps
larger than most of its values.
"""

import numpy as np
from absl import logging
from torch import nn

from qswin.calib.calibrators import Histogram
from qswin.qat.quant.layers import QuantAdd
from qswin.qat.quant.quantizers import TensorQuantizer
from qswin.qat.quant.rewrite import leave_in_float

RATIO = 127  # of a range to the median magnitude: INT8's step is then larger than half of all values


def leave_massive_adds(model: nn.Module) -> None:
    """Takes the quantizers out of the residual adds that have massive activations on either branch, and warns.

    Args:
        model: made by `quantize`, its ranges found, its histograms still there.
    """
    adds = [module for module in model.modules() if isinstance(module, QuantAdd)]
    massive = [_site(add) for add in adds if any(map(_is_massive, _quantizers(add)))]
    leave_in_float(model, massive)
    if massive:
        what = "have massive activations, which one INT8 range cannot hold; they stay in float"
        logging.warning("%d of %d residual adds %s: %s", len(massive), len(adds), what, ", ".join(massive))


def _quantizers(add: QuantAdd) -> list[TensorQuantizer]:
    pair = (add._input_quantizer, add._other_quantizer)
    return [quantizer for quantizer in pair if isinstance(quantizer, TensorQuantizer)]


def _site(add: QuantAdd) -> str:
    return next((quantizer.site.rpartition(".")[0] for quantizer in _quantizers(add)), "")


def _is_massive(quantizer: TensorQuantizer) -> bool:
    histogram = quantizer.histogram
    return histogram is not None and quantizer.spec.grid.even and float(quantizer.amax) > RATIO * median(histogram)


def median(histogram: Histogram) -> float:
    """The median magnitude, to one bin's width: the upper edge of its bin."""
    cumulative = np.cumsum(histogram.counts)
    return float(histogram.edges[int(np.searchsorted(cumulative, cumulative[-1] / 2)) + 1])
