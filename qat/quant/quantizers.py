"""TensorQuantizer: the one stateful piece of quantization, a range and what is done with it."""

import dataclasses
import enum
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qswin.calib.calibrators import BINS, Histogram, check_calibrator, find_range
from qswin.qat.quant.fake_quantize import fake_quantize, least_squares_amax, quantize_dequantize, scale_gradient

CPU_CHUNK = 1 << 18  # values counted at a time on a CPU: the temporaries stay in its cache


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    `axis` None gives the tensor one range, 0 gives each output channel of a weight its own. `narrow` leaves out the lowest
    level: [-127, 127] for INT8 weights, [-128, 127] for activations. `amax` fixes the range instead of calibrating it.
    """

    bits: int = 8
    axis: int | None = None
    narrow: bool = False
    calibrator: str = "max"
    amax: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is not supported; choose 2 to 8")
        if self.amax is not None and not 0 < self.amax < float("inf"):
            raise ValueError(f"amax={self.amax} is not a range; give a positive number")
        check_calibrator(self.calibrator)

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax if self.narrow else -self.qmax - 1


class Mode(enum.Enum):
    OFF = "off"  # passes its input on
    OBSERVING = "observing"  # passes it on and counts it
    QUANTIZING = "quantizing"  # rounds it to the grid


class TensorQuantizer(nn.Module):
    """Observes or fake-quantizes a tensor. Named as in pytorch-quantization, with the same state-dict key `_amax`.

    The range |x| <= `_amax` is a buffer: one value, or [C, 1, ...] for the C output channels of a weight; NaN until it is
    calibrated. With `learn_range` the range becomes _amax * exp(_log_gain), with a trained `_log_gain` that starts at 0: the
    scale stays positive, and one learning rate suits ranges of every magnitude.

    Args:
        spec: how to quantize.
        site: the site's name in recipes, tables and errors.
        channels: for a weight with `spec.axis` 0, its shape.
    """

    def __init__(self, spec: QuantSpec, site: str = "", weight_shape: torch.Size | None = None) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        self.mode = Mode.OFF
        self.histogram: Histogram | None = None
        shape: tuple[int, ...] = ()
        if spec.axis is not None and weight_shape is not None:
            shape = tuple(n if i == spec.axis else 1 for i, n in enumerate(weight_shape))
        self.register_buffer("_amax", torch.full(shape, spec.amax or float("nan")))
        self._amax: Tensor
        self._log_gain: nn.Parameter | None = None

    @property
    def amax(self) -> Tensor:
        """The range, float32, of `_amax`'s shape."""
        return self._amax if self._log_gain is None else self._amax * self._log_gain.exp()

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.OFF:
            return x
        if self.mode is Mode.OBSERVING:
            self._observe(x)
            return x
        scale = self.amax / self.spec.qmax
        if torch.onnx.is_in_onnx_export():
            return self._export(x, scale)
        if self._log_gain is not None and self.training:
            scale = scale_gradient(scale, self._gradient_scale(x))
        return fake_quantize(x, scale, self.spec.qmin, self.spec.qmax)

    def _gradient_scale(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(n * qmax), n being the values that share a scale (Esser et al. 2020, section 2.2)."""
        return (x.numel() / self._amax.numel() * self.spec.qmax) ** -0.5

    def _export(self, x: Tensor, scale: Tensor) -> Tensor:
        """INT8's Q saturates by itself; an activation's narrower grid is clipped first (weights are already clipped)."""
        if self.spec.bits < 8 and not self.spec.narrow:
            x = torch.clamp(x, self.spec.qmin * scale, self.spec.qmax * scale)
        return quantize_dequantize(x, scale, self.spec.axis)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Counts |x| into the histogram; the binning is `Histogram.add`'s, done on x's device."""
        if self.histogram is None or self.spec.amax is not None:
            return
        parts = x.detach().split(_rows(x))
        magnitudes = torch.empty(parts[0].numel(), device=x.device)
        bins = torch.empty(parts[0].numel(), dtype=torch.int16, device=x.device)
        for part in parts:
            here = magnitudes[: part.numel()]
            here.view(part.shape).copy_(part).abs_()
            self._reserve(here.max().item())
            index = bins[: part.numel()].copy_(here.mul_(1 / self.histogram.bin_width))
            self.histogram.counts += torch.bincount(index, minlength=BINS).cpu().numpy()

    def _reserve(self, amax: float) -> None:
        assert self.histogram is not None
        try:
            self.histogram.reserve(amax)
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}; look for an overflow or a broken weight before this site") from error

    def observe(self) -> None:
        """Starts counting afresh."""
        self.mode, self.histogram = Mode.OBSERVING, Histogram()

    def quantize(self) -> None:
        """Starts quantizing. Raises ValueError, naming the site, when the range is no range."""
        self.check_range()
        self.mode = Mode.QUANTIZING

    def off(self) -> None:
        """Passes tensors on unchanged from now."""
        self.mode = Mode.OFF

    def check_range(self) -> None:
        """Raises ValueError, naming the site, unless every value of the range is positive and finite."""
        problem = self.range_problem()
        if problem:
            raise ValueError(f"{self.site}: {problem}")

    def range_problem(self) -> str | None:
        """What is wrong with the range and what to do, or None."""
        amax = self.amax.detach()
        if amax.isnan().any():
            return "its range was never calibrated; run qswin calibrate, or leave the site out of the recipe"
        if amax.isinf().any():
            return "its range is infinite; look for an overflow before this site"
        if (amax <= 0).any():
            return "its range is dead (0): mend it with `dead_range` in the recipe, or leave the site out"
        return None

    def set_range_from_histogram(self, calibrator: str | None = None) -> None:
        """Takes the range from what was observed, by the spec's calibrator or another one.

        Raises:
            ValueError: nothing was observed.
        """
        if self.spec.amax is not None:
            return
        if self.histogram is None or not self.histogram.counts.any():
            raise ValueError(f"{self.site}: nothing was observed; the calibration images never reached this site")
        self._amax.fill_(find_range(self.histogram, calibrator or self.spec.calibrator, self.spec.bits))

    def set_range_from_weight(self, weight: Tensor) -> None:
        """Takes the range from a weight by the spec's calibrator, for each channel where the spec says so."""
        if self.spec.amax is not None:
            return
        amax = self.largest(weight)
        if self.spec.calibrator == "mse":
            amax = least_squares_amax(weight.detach(), amax, self.spec.qmin, self.spec.qmax)
        self._amax.copy_(amax)

    def largest(self, weight: Tensor) -> Tensor:
        """The largest |w| of each range, of `_amax`'s shape."""
        others = [d for d in range(weight.ndim) if d != self.spec.axis]
        return weight.detach().abs().amax(others, keepdim=self.spec.axis is not None)

    def learn_range(self) -> None:
        """Makes the range a trained parameter that starts where the range is now."""
        if self._log_gain is None:
            self._log_gain = nn.Parameter(torch.zeros_like(self._amax))

    def freeze_range(self) -> None:
        """Ends `learn_range`: the learned range becomes the buffer `_amax`."""
        if self._log_gain is not None:
            self._amax.copy_(self.amax.detach())
            self._log_gain = None

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.bits} bits, {'per tensor' if spec.axis is None else f'axis {spec.axis}'}, {self.mode.value}"


def _rows(x: Tensor) -> int:
    """How much of a tensor's first dimension to count at a time: CPU_CHUNK values on a CPU, else all."""
    return max(1, CPU_CHUNK * len(x) // x.numel()) if x.is_cpu else len(x)


def quantizers(model: nn.Module) -> Iterator[TensorQuantizer]:
    """Every TensorQuantizer of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, TensorQuantizer))


def table(model: nn.Module) -> str:
    """One line a quantizer: site, bits, range and state."""
    rows = [("site", "bits", "range", "state")]
    for quantizer in quantizers(model):
        low, high = quantizer.amax.detach().aminmax()
        ends = f"{low:.4g}" if quantizer.amax.numel() == 1 else f"{low:.4g} .. {high:.4g} x{quantizer.amax.numel()}"
        state = quantizer.mode.value if quantizer.range_problem() is None else "uncalibrated"
        rows.append((quantizer.site, str(quantizer.spec.bits), ends, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
