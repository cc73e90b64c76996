"""How an engine is built, and whether an installed TensorRT, a graph and these options go together."""

import dataclasses
from pathlib import Path

import onnx

from qswin.calib.data.batches import MOST_IMAGES
from qswin.calib.validation import shown
from qswin.trt.engines.cuda import find_gpu
from qswin.trt.engines.version import TARGETS, TensorRT
from qswin.trt.graphs.files import opset
from qswin.trt.graphs.half_precision import is_half, is_quantized, level_formats

PRECISIONS = ("fp32", "tf32", "fp16", "int8", "fp8", "best")
FLOATING = ("fp32", "tf32", "fp16")
OLDEST_FP8 = (8, 9)  # compute capability
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
LACKING = {  # {target: {option that it lacks: why}}
    "tensorrt": {"capability": "which builds for the GPU that is here"},
    "tensorrt-rtx": {"calib_cache": "which has no implicit INT8; build a Q/DQ graph instead"},
}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build an engine. The names are those of the flags of `qswin build`.

    Attributes:
        target: tensorrt or tensorrt-rtx.
        precision: fp32, tf32, fp16, int8 or fp8 (the rest in FP16), or best: all that the builder may choose from.
        batch_sizes: smallest, usual and largest batch, for a graph whose batch is free.
        override: see qswin.trt.engines.precision.resolve_overrides.
        calib_cache: a calibration cache, for INT8 of a graph without Q/DQ (TensorRT before 11).
        capability: the compute capability that TensorRT-RTX builds for; None for 8.9.
        timing_cache: a file of measured tactics, read and added to.
        workspace: bytes of GPU memory that tactics may use; None for all of it.
        level: builder optimization level, 0 to 5; None for TensorRT's default.
        fold: fold constants first (Polygraphy, ONNX-GraphSurgeon).

    Raises:
        ValueError: the target or the precision is not known, or the target lacks an option that is given.
    """

    target: str = "tensorrt"
    precision: str = "best"
    batch_sizes: tuple[int, int, int] = (1, 8, 64)
    override: tuple[str, ...] = ()
    calib_cache: Path | None = None
    capability: str | None = None
    timing_cache: Path | None = None
    workspace: int | None = None
    level: int | None = None
    fold: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is not known; choose {' or '.join(TARGETS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not known; choose {', '.join(PRECISIONS)}")
        for option, reason in LACKING[self.target].items():
            if getattr(self, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} is not for --target {self.target}, {reason}")


def check_possible(
    path: Path, model: onnx.ModelProto, options: BuildOptions, tensorrt: TensorRT, calibrated: bool = False
) -> None:
    """Raises ValueError when TensorRT, the graph and the precision do not go together, and says what would.

    Args:
        calibrated: the ranges come from a calibrator.
    """
    can = tensorrt.can
    if opset(model) > can.newest_opset:
        raise ValueError(
            f"{path}: opset {opset(model)}, but {tensorrt} takes {can.newest_opset} at most;"
            f" qswin export --opset {can.newest_opset}"
        )
    if can.needs_gpu and find_gpu() is None:
        raise ValueError(
            f"{tensorrt} builds on a GPU, and there is none here; --target tensorrt-rtx builds without one"
        )
    if options.override and options.precision in ("fp32", "tf32"):
        raise ValueError(
            "--override is for --precision fp16, int8, fp8 or best: in fp32 and tf32 there is nothing to keep"
        )
    _check_precision(path, model, options, calibrated)
    _check_formats(path, model, options, tensorrt)
    if options.calib_cache is not None:
        _check_cached(path, options, tensorrt, is_quantized(model))


def _check_precision(path: Path, model: onnx.ModelProto, options: BuildOptions, calibrated: bool) -> None:
    quantized = is_quantized(model)
    if quantized and options.precision in FLOATING:
        raise ValueError(f"{path}: has Q/DQ nodes; build it as int8, fp8 or best, or export with --precision fp32")
    if is_half(model) and options.precision in ("fp32", "tf32"):
        raise ValueError(f"{path}: its weights are FP16; export with --precision fp32")
    if options.precision == "int8" and not (quantized or calibrated or options.calib_cache):
        raise ValueError(f"{path}: has no Q/DQ nodes; export with --precision int8, or give a --calib-cache")


def _check_formats(path: Path, model: onnx.ModelProto, options: BuildOptions, tensorrt: TensorRT) -> None:
    """Raises ValueError where the number formats of the graph's Q/DQ are not the precision's, or none of TensorRT's."""
    found = level_formats(model)
    if "uint8" in found:
        raise ValueError(
            f"{path}: has Q/DQ nodes with unsigned levels, which {tensorrt} lacks; calibrate without uint8"
        )
    if options.precision == "fp8" and "fp8" not in found:
        raise ValueError(f"{path}: has no FP8 Q/DQ nodes; calibrate with recipe=attention-fp8 and export that")
    if "fp8" not in found:
        return
    if options.precision == "int8":
        raise ValueError(f"{path}: its Q/DQ nodes are FP8; build it as fp8 or best")
    if not tensorrt.can.fp8:
        raise ValueError(f"{path}: its Q/DQ nodes are FP8, which {tensorrt} lacks; TensorRT 10 and newer have it")
    capability = options.capability
    if capability is None and tensorrt.can.needs_gpu and (gpu := find_gpu()) is not None:
        capability = gpu.capability
    if capability is not None and _numbers(capability) < OLDEST_FP8:
        raise ValueError(f"{path}: FP8 needs compute capability 8.9 or newer, not {capability}; calibrate to INT8")


def _numbers(capability: str) -> tuple[int, ...]:
    """(8, 9) of "8.9". Raises ValueError for what is not a compute capability."""
    parts = capability.split(".")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--capability {capability}: give a compute capability, such as 8.9")
    return tuple(map(int, parts))


def _check_cached(path: Path, options: BuildOptions, tensorrt: TensorRT, quantized: bool) -> None:
    if not tensorrt.can.implicit_int8:
        raise ValueError(
            f"{tensorrt} has no implicit INT8, so no use for a calibration cache; build a Q/DQ graph instead"
        )
    if quantized or options.precision in FLOATING:
        raise ValueError(f"{path}: a calibration cache is for --precision int8 or best of a graph without Q/DQ nodes")


def parse_profile(text: str) -> tuple[int, int, int]:
    """(1, 16, 64) of "1,16,64"; one number stands for all three. Raises ValueError for anything else."""
    try:
        batches = [int(batch) for batch in text.split(",")]
    except ValueError:
        batches = []
    low, usual, high = batches * 3 if len(batches) == 1 else batches if len(batches) == 3 else (0, 0, 0)
    if not 0 < low <= usual <= high <= MOST_IMAGES:
        how = f"give the smallest, usual and largest batch in order, such as 1,16,64, up to {MOST_IMAGES}"
        raise ValueError(f"--batch-sizes {shown(text)}: {how}")
    return low, usual, high


def parse_bytes(text: str) -> int:
    """Bytes of "4GiB", "512MiB" or a plain number. Raises ValueError for anything else."""
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdecimal() or unit not in UNITS:
        raise ValueError(f"{text!r} is not a size; write 4GiB, 512MiB or a number of bytes")
    return int(number) * UNITS[unit]
