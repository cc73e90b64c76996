"""The job of `qswin export`: from a checkpoint's file to an ONNX file with metadata."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qswin.calib.data.batches import MOST_IMAGES
from qswin.calib.files import check_suffix
from qswin.calib.validation import shown, validate
from qswin.qat.checkpoint import Description, load_model
from qswin.qat.export.onnx_export import DEFAULT_OPSET, QUANTIZED, export_onnx, save_onnx
from qswin.qat.ptq.verdict import Verdict, tell
from qswin.qat.quant.quantizers import own_precision

Size = tuple[int, int] | None  # (height, width) of images; None for any


@dataclasses.dataclass(frozen=True)
class Exported:
    """An ONNX file that was written; `metadata` is what it says of itself."""

    path: Path
    size: int  # bytes
    nodes: int  # apart from Q/DQ
    qdq_nodes: int
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        counts = {"bytes": self.size, "nodes": self.nodes, "qdq_nodes": self.qdq_nodes}
        return {"onnx": str(self.path), **counts, **self.metadata}

    def __str__(self) -> str:
        return f"{self.path}: {self.nodes} nodes and {self.qdq_nodes} of Q/DQ, {self.size / 1e6:.1f} MB"


def parse_batch_size(text: str) -> int | None:
    """None of "dynamic", 16 of "16". Raises ValueError for anything else, and for more than 65,536."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or len(text) > 5 or not 0 < int(text) <= MOST_IMAGES:
        raise ValueError(f"--batch-size {shown(text)}: give a number of 1 to {MOST_IMAGES}, or dynamic")
    return int(text)


def parse_sizes(text: str | None) -> list[Size]:
    """(height, width) of each of "800x1344,1344x800"; one None, for any size, of "dynamic"; nothing of None.

    Raises:
        ValueError: for anything else.
    """
    if text is None or text == "dynamic":
        return [] if text is None else [None]
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) for size in text.split(",")]
    if not all(found):
        raise ValueError(f"--sizes {text}: give HEIGHTxWIDTH, several with commas between, or dynamic")
    return [(int(match[1]), int(match[2])) for match in found if match]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported; see `export_onnx`.

    Args:
        sizes: of images, a graph for each; None is a graph for any size. Without any, the checkpoint's own.
        strict: a bad verdict is an error.
    """

    precision: str | None = None
    opset: int = DEFAULT_OPSET
    batch_size: int | None = None
    sizes: Sequence[Size] = ()
    strict: bool = False


def export_checkpoint(
    checkpoint: Path,
    path: Path,
    options: ExportOptions,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Exported]:
    """Exports a checkpoint, or the bare weights that a config describes; see `export_onnx`.

    Of several sizes each has a file of its own, `int8-800x1344.onnx` for `int8.onnx`. The verdict in the sidecar of a
    quantized one is said again; where `strict`, a bad one is an error.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the name does not end in .onnx, `load_model` or `export_onnx` refuses, or the verdict is bad.
    """
    check_suffix("--onnx", path, (".onnx",))
    model, description, digest = load_model(checkpoint, config_file, list(overrides))
    description = dataclasses.replace(description, parent=digest)
    precision = options.precision or own_precision(model)
    if precision in QUANTIZED and "verdict" in description.metrics:
        verdict = validate(description.metrics["verdict"], Verdict, f"{checkpoint}: metrics.verdict", beside=("good",))
        tell(verdict, "calibrate again, with recipe=auto", options.strict)
    options = dataclasses.replace(options, precision=precision)
    own = description.preprocessing.size
    if len(options.sizes) < 2:
        return [_export(model, description, path, options, size) for size in options.sizes or (own,)]
    return [_export(model, description, _of_size(path, size), options, size) for size in options.sizes]


def _of_size(path: Path, size: Size) -> Path:
    return path.with_stem(f"{path.stem}-{'any' if size is None else '{}x{}'.format(*size)}")


def _export(model: Any, description: Description, path: Path, options: ExportOptions, size: Size) -> Exported:
    if size is not None:
        preprocessing = dataclasses.replace(description.preprocessing, size=size)
        description = dataclasses.replace(description, preprocessing=preprocessing)
    graph = export_onnx(model, description, options.precision, options.opset, options.batch_size, size is None)
    metadata = description.to_dict() | {"precision": options.precision, "opset": options.opset}
    if strides := getattr(model, "strides", None):
        metadata["strides"] = strides
    save_onnx(path, graph, metadata)
    counts = [node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.graph]
    return Exported(path, path.stat().st_size, counts.count(False), counts.count(True), metadata)
