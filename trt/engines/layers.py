"""What an engine or an ONNX graph consists of: layers, their precisions, their times and what was fused."""

import dataclasses
import json
import re
from collections import Counter
from typing import Any

import onnx

from qswin.calib.data.images import noise_images
from qswin.calib.messages import text_of
from qswin.trt.engines.engine import Engine
from qswin.trt.engines.version import tensorrt_module

# As TensorRT's inspector writes formats, "Row major linear FP16 format" or "Half" or "Int8": the first found counts.
TYPES = {
    "fp32": ("FP32", "Float"),
    "fp16": ("FP16", "Half"),
    "bf16": ("BF16", "BFloat16"),
    "int8": ("Int8", "INT8"),
    "fp8": ("Fp8", "FP8", "Float8"),
    "int32": ("Int32", "INT32"),
    "int64": ("Int64", "INT64"),
    "bool": ("Bool", "BOOL"),
}
RUNS = 20  # of an engine, whose times are averaged
FLOATING = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of an engine, or a node of a graph.

    `nodes` are the ONNX nodes fused into it, `inputs` and `outputs` its tensors' types, `ms` its time when measured.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ms: float | None = None

    @property
    def precisions(self) -> frozenset[str]:
        """Types of its floating outputs."""
        return frozenset(kind for kind in self.outputs if kind in FLOATING)


def tensor_type(description: str) -> str:
    """fp32, fp16, int8, ... from the inspector's description of a tensor's format; "unknown" if it names none."""
    for kind, words in reversed(TYPES.items()):  # BF16 contains FP16's letters
        if any(re.search(rf"\b{word}\b", description) for word in words):
            return kind
    return "unknown"


def engine_layers(engine: Any) -> list[Layer]:
    """The layers of a TensorRT engine that was built with detailed profiling verbosity, as `qswin build` does."""
    form = tensorrt_module().LayerInformationFormat.JSON
    return parse_layers(engine.create_engine_inspector().get_engine_information(form))


def timed_layers(engine: Engine) -> list[Layer]:
    """An engine's layers with the mean time of each at the largest batch, by TensorRT's own profiler."""
    trt = tensorrt_module()

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.total: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.total[layer_name] = self.total.get(layer_name, 0.0) + ms

    engine.load(noise_images(engine.largest, engine.preprocessing))
    for _ in range(3):  # warms up unmeasured
        engine.run_loaded()
    engine.context.profiler = profiler = Profiler()
    for _ in range(RUNS):
        engine.run_loaded()
    return [
        dataclasses.replace(layer, ms=profiler.total[layer.name] / RUNS if layer.name in profiler.total else None)
        for layer in engine_layers(engine.engine)
    ]


def parse_layers(text: str) -> list[Layer]:
    """Layers from the JSON of TensorRT's engine inspector."""
    return [_parse_layer(layer) for layer in json.loads(text)["Layers"]]


def _parse_layer(layer: dict[str, Any] | str) -> Layer:
    if isinstance(layer, str):  # an engine without detailed verbosity lists names only
        return Layer(layer, "", _nodes(layer), (), ())
    described = layer.get("Metadata", "") or layer["Name"]
    inputs, outputs = (
        tuple(tensor_type(tensor.get("Format/Datatype", "")) for tensor in layer.get(key, ()))
        for key in ("Inputs", "Outputs")
    )
    return Layer(layer["Name"], layer.get("LayerType", ""), _nodes(described), inputs, outputs)


def _nodes(described: str) -> tuple[str, ...]:
    """ONNX nodes in a layer's name ("a + b", "PWN(a, b)", "{ForeignNode[a...b]}") or metadata ("[ONNX Layer: a]")."""
    tagged = re.findall(r"\[ONNX Layer: ([^\]]+)\]", described)
    return tuple(tagged or re.findall(r"[\w./:-]*[A-Za-z_][\w./:]*", described.replace("...", " ")))


def graph_layers(model: onnx.ModelProto) -> list[Layer]:
    """The nodes of an ONNX graph with the types that shape inference gives their tensors.

    Raises:
        ValueError: the graph contradicts itself.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, TypeError) as error:
        raise ValueError(f"the graph contradicts itself ({' '.join(str(error).split())[:200]})") from error
    types = {
        info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    names = {
        onnx.TensorProto.FLOAT: "fp32",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.INT8: "int8",
        onnx.TensorProto.FLOAT8E4M3FN: "fp8",
        onnx.TensorProto.INT32: "int32",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.BOOL: "bool",
    }

    def kinds(tensors: Any) -> tuple[str, ...]:
        return tuple(names.get(types.get(tensor, 0), "unknown") for tensor in tensors if tensor)

    return [
        Layer(node.name, node.op_type, (node.name,), kinds(node.input), kinds(node.output)) for node in model.graph.node
    ]


def layer_table(layers: list[Layer]) -> str:
    """One line a layer, the slowest first where times are known, and a summary of kinds and precisions."""
    timed = [layer for layer in layers if layer.ms is not None]
    shown = sorted(timed, key=lambda layer: -(layer.ms or 0)) if timed else layers
    lines = [
        f"{'' if layer.ms is None else f'{layer.ms:8.4f}  '}{'/'.join(sorted(layer.precisions)) or '-':<10} "
        f"{layer.kind:<20} {layer.name}"
        for layer in shown
    ]
    precisions = Counter("/".join(sorted(layer.precisions)) or "-" for layer in layers)
    kinds = Counter(layer.kind for layer in layers)
    total = f"; {sum(layer.ms or 0 for layer in timed):.3f} ms" if timed else ""
    summary = ", ".join(f"{count} {name}" for name, count in precisions.most_common())
    return text_of([*lines, "", f"{len(layers)} layers: {summary}{total}", str(dict(kinds.most_common(12)))])
