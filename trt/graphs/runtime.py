"""ONNX files in ONNX Runtime, the engine that runs everywhere. No torch."""

from pathlib import Path

import numpy as np
import onnxruntime

from qswin.calib.data.batches import fill_up, joined
from qswin.calib.trt_cache.session import Session
from qswin.trt.graphs.files import check_interface, parse_metadata, parse_onnx, read_graph
from qswin.trt.graphs.half_precision import is_quantized

# In graphs of a fixed batch this fusion makes a float Gemm of each quantized MatMul with its bias, which dequantizes
# its weights in every run: four times slower than the integer kernels that such graphs get without it.
FLOAT_GEMMS = ("MatMulAddFusion",)


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
        if self.batch_size and is_quantized(model):
            self._session = Session(path, data, timeout, threads, FLOAT_GEMMS)
        metadata = parse_metadata(path, read_properties(path, self._session.session))
        self.backend, self.precision = f"onnxruntime {onnxruntime.__version__}", metadata.precision
        self.preprocessing = metadata.preprocessing
        self.task: str = metadata.task
        self.classes: list[str] | None = metadata.classes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        padded = fill_up(images, self.batch_size or 0)
        return joined([output[: len(images)] for output in self._session.run(self._outputs, padded)])
