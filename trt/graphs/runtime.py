"""ONNX files in ONNX Runtime, the engine that runs everywhere. No torch."""

import functools
from pathlib import Path

import numpy as np
import onnxruntime
from absl import logging
from onnx import TensorProto, helper, numpy_helper

from qswin.calib.data.batches import fill_up, joined
from qswin.calib.trt_cache.session import Session
from qswin.trt.graphs.files import check_interface, parse_metadata, parse_onnx, read_graph
from qswin.trt.graphs.half_precision import is_quantized

# In graphs of a fixed batch this fusion makes a float Gemm of each quantized MatMul with its bias, which dequantizes
# its weights in every run: four times slower than the integer kernels that such graphs get without it.
FLOAT_GEMMS = ("MatMulAddFusion",)


SATURATES = "ONNX Runtime's INT8 sums saturate on this CPU, which lacks VNNI"


@functools.cache
def int8_sums_saturate() -> bool:
    """Whether ONNX Runtime's INT8 kernels are wrong on this CPU: without VNNI they add pairs of products in 16 bits.

    A product of the largest levels tells. See "When and why do I need to try U8U8?" in
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    depth, level = 32, np.int8(127)
    scale, zero = (
        numpy_helper.from_array(np.array(value), name)
        for value, name in ((np.float32(1), "scale"), (np.int8(0), "zero"))
    )
    weights = numpy_helper.from_array(np.full((depth, 4), level), "weights")
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["weights", "scale", "zero"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["product"]),
    ]
    input_, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", [2, depth]), ("product", [2, 4]))
    )
    graph = helper.make_graph(nodes, "probe", [input_], [product], [scale, zero, weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": np.full((2, depth), level, dtype=np.float32)})[0]
    return bool((found != depth * float(level) ** 2).any())


def read_properties(path: str | Path, session: onnxruntime.InferenceSession) -> dict[str, str]:
    """The file's metadata properties. Raises ValueError where they are no text."""
    try:
        return session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its metadata is damaged ({error}); export it again") from error


class OnnxRuntimePredictor:
    """Runs an ONNX file that qswin exported: (N, 3, H, W) float32 -> logits, float32, or `joined` feature maps.

    Args:
        threads: of computing; 0 for all cores.
        timeout: seconds that loading it and a run may take; None for any number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file, or not one of qswin's.
    """

    def __init__(self, path: str | Path, threads: int = 0, timeout: float | None = None) -> None:
        data = read_graph(path)
        model = parse_onnx(path, data)
        self._outputs = check_interface(path, model)
        self._session = Session(path, data, timeout, threads)
        batch = self._session.session.get_inputs()[0].shape[0]
        self.batch_size: int | None = batch if isinstance(batch, int) else None  # None: any
        quantized = (self.batch_size or int8_sums_saturate()) and is_quantized(model)
        if quantized and self.batch_size:
            self._session = Session(path, data, timeout, threads, FLOAT_GEMMS)
        if quantized and int8_sums_saturate():
            logging.warning("%s: its results are wrong here: %s", path, SATURATES)
        metadata = parse_metadata(path, read_properties(path, self._session.session))
        self.backend, self.precision = f"onnxruntime {onnxruntime.__version__}", metadata.precision
        self.preprocessing = metadata.preprocessing
        self.task: str = metadata.task
        self.classes: list[str] | None = metadata.classes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        padded = fill_up(images, self.batch_size or 0)
        return joined([output[: len(images)] for output in self._session.run(self._outputs, padded)])
