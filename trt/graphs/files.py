"""ONNX files as qswin writes them: the graph, and the metadata that makes evaluation need no config."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from qswin.calib.data.images import Preprocessing
from qswin.calib.validation import Task, take

REMEDY = "export it with qswin export"


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


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What running an exported graph takes of its metadata, which say more."""

    task: Task
    preprocessing: Preprocessing
    classes: list[str] | None
    precision: str = "as exported"


def metadata_values(path: str | Path, properties: dict[str, str]) -> dict[str, Any]:
    """All that the exporter wrote: preprocessing, classes, recipe, the checkpoint's checksum.

    Raises:
        ValueError: the file is not one of qswin's.
    """
    try:
        values = json.loads(properties["qswin"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: has no qswin metadata; {REMEDY}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: its qswin metadata are not a JSON object; {REMEDY}")
    return values


def parse_metadata(path: str | Path, properties: dict[str, str]) -> Metadata:
    """Of what the exporter wrote, what running the graph takes. Raises ValueError where it is not that."""
    return take(metadata_values(path, properties), Metadata, f"{path}: its qswin metadata", REMEDY)


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
