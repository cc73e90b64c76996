"""ONNX files as qswin writes them: the graph, and the metadata that makes evaluation need no config."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from qswin.calib.data.images import Preprocessing
from qswin.calib.reading import parse_json, read_regular
from qswin.calib.validation import Task, shown, take

REMEDY = "export it with qswin export"
LARGEST = (2 << 30) - 1  # bytes of a protobuf message


def read_graph(path: str | Path) -> bytes:
    """The content of an ONNX file. Raises FileNotFoundError, and ValueError for one that protobuf cannot hold."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such ONNX file")
    return read_regular(path, LARGEST)


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """The model of an ONNX file. Raises FileNotFoundError, and ValueError as `parse_onnx` does."""
    return open_onnx(path)[0]


def open_onnx(path: str | Path) -> tuple[onnx.ModelProto, str]:
    """The model of an ONNX file and the SHA-256 of the bytes that it was read from. Raises as `read_onnx` does."""
    data = read_graph(path)
    return parse_onnx(path, data), hashlib.sha256(data).hexdigest()


def parse_onnx(path: str | Path, data: bytes) -> onnx.ModelProto:
    """The model that the content of a file holds.

    Raises:
        ValueError: it is not an ONNX file, or keeps tensors in other files, which qswin's do not.
    """
    try:
        model = onnx.load_from_string(data)
    except (DecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not an ONNX file, or a truncated one; export it again") from error
    if not model.graph.node:
        raise ValueError(f"{path}: not an ONNX file, or an empty one; export it again")
    external = next((tensor.name for tensor in _tensors(model) if uses_external_data(tensor)), None)
    if external is not None:
        raise ValueError(f"{path}: keeps {external!r} in another file, which is not read; {REMEDY}")
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants of a model: initializers and attributes, in subgraphs and functions too."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if not nodes:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes = list(graph.node)
        for attribute in nodes.pop().attribute if nodes else ():
            yield from (attribute.t, *attribute.tensors)
            graphs += [graph for graph in (attribute.g, *attribute.graphs) if graph.node]


def check_interface(path: str | Path, model: onnx.ModelProto) -> list[str]:
    """The names of a graph's outputs: `logits`, or a backbone's feature maps.

    Raises:
        ValueError: the graph does not take float32 `input` (N, 3, H, W), or does not give float32 (N, ...).
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs, maps = list(model.graph.output), _gives_features(path, model)
    expected = {"input": inputs} if maps else {"input": inputs, "logits": outputs}
    for name, values in expected.items():
        if [value.name for value in values] != [name]:
            found = shown([value.name for value in values])
            raise ValueError(f"{path}: its {name} should be one tensor named {name!r}, it has {found}; {REMEDY}")
    for value in (*inputs, *outputs):
        kind, tensor = value.type.WhichOneof("value"), value.type.tensor_type
        rank = len(tensor.shape.dim) if kind == "tensor_type" else 0
        wrong = rank != 4 if value.name == "input" or maps else rank < 2
        if tensor.elem_type != onnx.TensorProto.FLOAT or wrong:
            what = f"{kind} {onnx.TensorProto.DataType.Name(tensor.elem_type)}, of {rank} dimensions"
            raise ValueError(f"{path}: its {value.name} is {what}; qswin's is a float32 tensor (N, ...); {REMEDY}")
    return [output.name for output in outputs]


def _gives_features(path: str | Path, model: onnx.ModelProto) -> bool:
    """Whether the metadata, where there are some, say that the graph is a backbone's."""
    known = properties(model)
    return "qswin" in known and metadata_values(path, known).get("task") == "features"


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
        text = properties["qswin"]
    except KeyError as error:
        raise ValueError(f"{path}: has no qswin metadata; {REMEDY}") from error
    values = parse_json(text, f"{path}: its qswin metadata")
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
