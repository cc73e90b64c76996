"""The job of `qswin export`: from a checkpoint's file to an ONNX file with metadata."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qswin.calib.data.batches import MOST_IMAGES
from qswin.calib.files import check_suffix
from qswin.calib.validation import shown, validate
from qswin.qat.checkpoint import load_model
from qswin.qat.export.onnx_export import QUANTIZED, export_onnx, save_onnx
from qswin.qat.ptq.verdict import Verdict, tell
from qswin.qat.quant.quantizers import own_precision


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


def export_checkpoint(
    checkpoint: Path,
    path: Path,
    precision: str | None,
    opset: int,
    batch_size: int | None,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
) -> Exported:
    """Exports a checkpoint, or the bare weights that a config describes; see `export_onnx`.

    The verdict in the sidecar of a quantized one is said again; where `strict`, a bad one is an error.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the name does not end in .onnx, `load_model` or `export_onnx` refuses, or the verdict is bad.
    """
    check_suffix("--onnx", path, (".onnx",))
    model, description, digest = load_model(checkpoint, config_file, list(overrides))
    precision = precision or own_precision(model)
    if precision in QUANTIZED and "verdict" in description.metrics:
        verdict = validate(description.metrics["verdict"], Verdict, f"{checkpoint}: metrics.verdict", beside=("good",))
        tell(verdict, "calibrate again, with recipe=auto", strict)
    graph = export_onnx(model, description, precision, opset, batch_size)
    metadata = dataclasses.replace(description, parent=digest).to_dict()
    metadata |= {"precision": precision, "opset": opset}
    save_onnx(path, graph, metadata)
    counts = [node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.graph]
    return Exported(path, path.stat().st_size, counts.count(False), counts.count(True), metadata)
