"""TensorQuantizer: the one stateful piece of quantization, a range and what is done with it."""

import dataclasses
import enum
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qswin.calib.calibrators import BINS, Histogram, find_range, parse_calibrator
from qswin.calib.grid import FP8, INT8, Grid
from qswin.qat.quant.fake_quantize import fake_quantize, quantize_dequantize, scale_gradient
from qswin.qat.quant.weight_ranges import weight_ranges

OFF_KEY = "_off"  # in the state dict of a quantizer that has a range and does not quantize
GAIN_KEY = "_log_gain"  # in the state dict of a quantizer whose range is learned
SCALE_KEY = "_pre_quant_scale"  # in the state dict of a quantizer whose input's channels are scaled first
CPU_CHUNK = 1 << 18  # values counted at a time on a CPU: the temporaries stay in its cache
IN_FLOAT = (
    "this model is calibrated, but some of its quantizers are off or observing: it computes in float there. "
    "Switch them on with qswin.enable(model), or say with qswin.disable(model, quiet=True) that float is what you want."
)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    `grid` is the number format; a weight's is `grid.of_weights`. `axis` None gives the tensor one range, 0 gives each
    output channel of a weight its own. `amax` fixes the range instead of calibrating it.
    """

    grid: Grid = INT8
    axis: int | None = None
    calibrator: str = "max"
    amax: float | None = None

    def __post_init__(self) -> None:
        if self.amax is not None and not 0 < self.amax < float("inf"):
            raise ValueError(f"amax={self.amax} is not a range; give a positive number")
        parse_calibrator(self.calibrator)


class Mode(enum.Enum):
    OFF = "off"  # passes its input on
    OBSERVING = "observing"  # passes it on and counts it
    QUANTIZING = "quantizing"  # rounds it to the grid


class TensorQuantizer(nn.Module):
    """Observes or fake-quantizes a tensor. Named as in pytorch-quantization, with the same state-dict key `_amax`.

    The range |x| <= `_amax` is a buffer: one value, or [C, 1, ...] for the C output channels of a weight; NaN until it
    is calibrated. With `learn_range` the range becomes _amax * exp(_log_gain), with a trained `_log_gain` that starts
    at 0: the scale stays positive, and one learning rate suits ranges of every magnitude. It has a dimension even where
    `_amax` has none: fully_shard takes no scalar parameters.

    The state dict says whether it quantizes. One with a range does, one without is off; a quantizer that has a range
    and does not quantize is marked by one more key, `_off`. One that has a range and computes in float warns of it.

    Channels may be scaled before all else, also where it is off: `_pre_quant_scale`, as ModelOpt calls it, is a buffer
    that broadcasts over the input, or None. Who sets it divides the next weight by it (qat/ptq/equalization.py).

    In training, each element of an activation keeps its float value with probability `keep_float`, which is 0 unless
    someone sets it: Wei et al., "QDrop", ICLR 2022, section 3.3.

    Args:
        spec: how to quantize.
        site: the site's name in recipes, tables and errors.
        weight_shape: the shape of the weight that it quantizes; None for an activation.
    """

    def __init__(self, spec: QuantSpec, site: str = "", weight_shape: torch.Size | None = None) -> None:
        super().__init__()
        self.spec, self.site, self.weight_shape = spec, site, weight_shape
        self.mode = Mode.OFF
        self.warns = False  # of computing in float
        self.keep_float = 0.0
        self.histogram: Histogram | None = None
        shape: tuple[int, ...] = ()
        if spec.axis is not None and weight_shape is not None:
            shape = tuple(n if i == spec.axis else 1 for i, n in enumerate(weight_shape))
        self.register_buffer("_amax", torch.full(shape, float("nan")))
        self._amax: Tensor
        self._pre_quant_scale: Tensor | None
        self.register_buffer(SCALE_KEY, None)
        self._log_gain: nn.Parameter | None = None

    @property
    def recipe_site(self) -> str:
        """The site as recipes name it: a weight's is its layer's, which is its input's too."""
        return self.site.removesuffix(".weight")

    @property
    def amax(self) -> Tensor:
        """The range, float32, of `_amax`'s shape. Outside of a forward of a sharded model, every rank asks for it."""
        if self._log_gain is None:
            return self._amax
        return self._amax * whole(self._log_gain).exp().view_as(self._amax)

    @property
    def scale(self) -> Tensor:
        """The real value of the grid's level 1, of `_amax`'s shape."""
        return self.spec.grid.scale(self.amax)

    def forward(self, x: Tensor) -> Tensor:
        if self._pre_quant_scale is not None:
            x = x * self._pre_quant_scale
        if self.mode is not Mode.QUANTIZING:
            if self.warns and not torch.compiler.is_compiling():
                self._warn()
            if self.mode is Mode.OBSERVING:
                self._observe(x)
            return x
        scale = self.scale
        if torch.onnx.is_in_onnx_export():
            return self._export(x, scale)
        if self._log_gain is not None and self.training:
            scale = scale_gradient(scale, self._gradient_scale(x))
        quantized = fake_quantize(x, scale, self.spec.grid)
        if self.training and self.keep_float and self.weight_shape is None:
            return torch.where(torch.rand_like(x) < self.keep_float, x, quantized)
        return quantized

    def _warn(self) -> None:
        self.warns = False
        warnings.warn(IN_FLOAT, stacklevel=3)  # Python shows the same text from the same place once

    def _gradient_scale(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(n * qmax), n being the values that share a scale (Esser et al. 2020, section 2.2)."""
        return (x.numel() / self._amax.numel() * self.spec.grid.qmax) ** -0.5

    def _export(self, x: Tensor, scale: Tensor) -> Tensor:
        """Where Q does not saturate at the grid's ends, an activation is clipped first (weights already are)."""
        grid = self.spec.grid
        assert grid.torch_dtype is not None  # export_onnx refuses it before
        if self.weight_shape is None and not grid.saturates:
            x = torch.clamp(x, grid.qmin * scale, grid.qmax * scale)
        return quantize_dequantize(x, scale, self.spec.axis, getattr(torch, grid.torch_dtype))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Counts |x| into the histogram; the binning is `Histogram.add`'s, done on x's device."""
        if self.spec.grid.qmin == 0 and bool((x < 0).any()):
            name = self.spec.grid.name
            raise ValueError(f"{self.site}: it has negative values, which {name} lacks; choose int8 or fp8 there")
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
            raise ValueError(
                f"{self.site}: {error}; look for an overflow or a broken weight before this site"
            ) from error

    def observe(self, quiet: bool = False) -> None:
        """Starts counting afresh. `quiet`: it is meant that a calibrated quantizer computes in float."""
        self.histogram = Histogram()
        self._switch(Mode.OBSERVING, quiet)

    def enable(self) -> None:
        """Starts quantizing. Raises ValueError, naming the site, when the range is missing, dead or infinite."""
        if self.spec.amax is not None and self._amax.isnan().any():
            self._amax.fill_(self.spec.amax)
        self.check_range()
        self._switch(Mode.QUANTIZING)

    def disable(self, quiet: bool = False) -> None:
        """Passes tensors on unchanged from now. `quiet`: it is meant that a calibrated quantizer computes in float."""
        self._switch(Mode.OFF, quiet)

    def _switch(self, mode: Mode, quiet: bool = False) -> None:
        self.mode = mode
        self.warns = mode is not Mode.QUANTIZING and not quiet and self._calibrated()

    def _calibrated(self) -> bool:
        return not self._amax.is_meta and not bool(self._amax.isnan().any())

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
            return "its range is dead (0); set dead_range in the recipe, or leave the site out of it"
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
        self._set_range(torch.tensor(find_range(self.histogram, calibrator or self.spec.calibrator, self.spec.grid)))

    def set_range_from_weight(self, weight: Tensor) -> None:
        """Takes the range from a weight by the spec's calibrator, for each channel where the spec says so.

        Raises:
            ValueError: a value is NaN or infinite, and the calibrator is neither max nor mse, whose ranges show it.
        """
        if self.spec.amax is not None:
            return
        try:
            self._set_range(weight_ranges(weight, self.spec.axis, self.spec.calibrator, self.spec.grid))
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}") from error

    def _set_range(self, amax: Tensor) -> None:
        self._amax.copy_(amax)
        if self.mode is Mode.OBSERVING:  # from here on it should quantize
            self._switch(Mode.OBSERVING)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mode is not Mode.QUANTIZING and self._calibrated():
            destination[f"{prefix}{OFF_KEY}"] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        off = state_dict.pop(f"{prefix}{OFF_KEY}", None) is not None
        scale = state_dict.get(f"{prefix}{SCALE_KEY}")
        self._pre_quant_scale = None if scale is None else torch.empty_like(scale, device=self._amax.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}_amax" in state_dict:
            self._switch(Mode.OFF if off or self.range_problem() else Mode.QUANTIZING)

    def learn_range(self) -> None:
        """Makes the range a trained parameter that starts where the range is now."""
        if self._log_gain is None:
            self._log_gain = nn.Parameter(torch.zeros_like(self._amax.view(self._amax.shape or (1,))))

    def freeze_range(self) -> None:
        """Ends `learn_range`: the learned range becomes the buffer `_amax`.

        Raises:
            ValueError: fully_shard has taken over the parameter, and would put it back.
        """
        if isinstance(self._log_gain, DTensor):
            raise ValueError(f"{self.site}: its learned range is sharded; save_checkpoint saves it as a range")
        if self._log_gain is not None:
            self._amax.copy_(self.amax.detach())
            self._log_gain = None

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.grid.name}, {'per tensor' if spec.axis is None else f'axis {spec.axis}'}, {self.mode.value}"


def _rows(x: Tensor) -> int:
    """How much of a tensor's first dimension to count at a time: CPU_CHUNK values on a CPU, else all."""
    return max(1, CPU_CHUNK * len(x) // x.numel()) if x.is_cpu else len(x)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which a sharded model holds a part on each rank; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of its parameters, as fully_shard leaves them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def quantizers(model: nn.Module) -> Iterator[TensorQuantizer]:
    """Every TensorQuantizer of a model, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, TensorQuantizer))


def own_precision(model: nn.Module) -> str:
    """What an exported or built model with its quantizers is called: fp8 where a site is in FP8, else int8."""
    return "fp8" if any(quantizer.spec.grid.name == FP8.name for quantizer in quantizers(model)) else "int8"


def check_precision(model: nn.Module, precision: str, subject: str) -> str:
    """A quantized model's own precision.

    Args:
        precision: what it is asked for in; "best" stands for its own.
        subject: what an error begins with: "a.safetensors:" or "the checkpoint is".

    Raises:
        ValueError: it is asked for in another one.
    """
    own = own_precision(model)
    if precision not in (own, "best"):
        raise ValueError(f"{subject} quantized to {own}, not {precision}; leave --precision out")
    return own


def table(model: nn.Module) -> str:
    """One line a quantizer: site, format, range and state."""
    rows = [("site", "format", "amax", "state")]
    for quantizer in quantizers(model):
        low, high = quantizer.amax.detach().aminmax()
        ends = f"{low:.4g}" if quantizer.amax.numel() == 1 else f"{low:.4g} .. {high:.4g} x{quantizer.amax.numel()}"
        state = quantizer.mode.value if quantizer.range_problem() is None else "uncalibrated"
        rows.append((quantizer.site, quantizer.spec.grid.name, ends, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
