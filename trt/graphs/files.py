"""ONNX files as qswin writes them: the graph, and the metadata that makes evaluation need no config."""

from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from qswin.calib.reading import parse_json


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """Reads an ONNX file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such ONNX file")
    try:
        model = onnx.load(str(path))
    except DecodeError as error:
        raise ValueError(f"{path}: not an ONNX file, or a truncated one; export it again") from error
    if not model.graph.node:
        raise ValueError(f"{path}: not an ONNX file, or an empty one; export it again")
    return model


def properties(model: onnx.ModelProto) -> dict[str, str]:
    """A model's metadata properties, the form that ONNX Runtime gives them in."""
    return {entry.key: entry.value for entry in model.metadata_props}


def parse_metadata(path: str | Path, properties: dict[str, str]) -> dict[str, Any]:
    """What the exporter wrote: preprocessing, classes, recipe, the checkpoint's checksum.

    Raises:
        ValueError: the file is not one of qswin's.
    """
    try:
        metadata = parse_json(properties["qswin"], f"{path}: its metadata")
        return {key: metadata[key] for key in ("task", "preprocessing", "classes")} | metadata
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: has no qswin metadata; export it with qswin export") from error


def opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return next(entry.version for entry in model.opset_import if entry.domain == "")


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """A copy whose free batch, if it has one, is fixed."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param:
            first.dim_value = batch
    return fixed
