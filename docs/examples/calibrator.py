"""A calibrator from outside the repository: `calibrator: sigma:6` clips at six times the root mean square."""

import numpy as np

from qswin.calib.calibrators import Histogram, Parameter, calibrator
from qswin.calib.grid import Grid


@calibrator("sigma", Parameter("sigmas", low=0, high=100))
def sigma_range(histogram: Histogram, grid: Grid, sigmas: float = 6.0) -> float:
    """`sigmas` times the root mean square of all values, at most the largest |x|."""
    centres = histogram.edges[:-1] + histogram.bin_width / 2
    mean_square = histogram.counts @ centres**2 / histogram.counts.sum()
    return min(histogram.amax, sigmas * float(np.sqrt(mean_square)))
