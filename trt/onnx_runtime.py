"""ONNX files in ONNX Runtime, the engine that runs everywhere. No torch."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from calib.batches import fill_up
from calib.images import Preprocessing
from trt.onnx_files import parse_metadata

LOAD_ERRORS = (errors.Fail, errors.InvalidGraph, errors.InvalidProtobuf, errors.InvalidArgument, errors.NotImplemented)


class OnnxRuntimePredictor:
    """Runs an ONNX file that qswin exported: (N, 3, H, W) float32 -> logits, float32.

    Attributes:
        metadata: what the exporter wrote: preprocessing, classes, recipe, the checkpoint's checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX file, or not one of qswin's.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such ONNX file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except LOAD_ERRORS as error:
            raise ValueError(
                f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); export it again"
            ) from error
        self.metadata = parse_metadata(path, self._session.get_modelmeta().custom_metadata_map)
        self.backend, self.precision = (
            f"onnxruntime {onnxruntime.__version__}",
            self.metadata.get("precision", "as exported"),
        )
        self.preprocessing = Preprocessing(**self.metadata["preprocessing"])
        self.task: str = self.metadata["task"]
        self.classes: list[str] | None = self.metadata["classes"]
        batch = self._session.get_inputs()[0].shape[0]
        self.batch_size: int | None = batch if isinstance(batch, int) else None  # None: any

    def __call__(self, images: np.ndarray) -> np.ndarray:
        padded = fill_up(images, self.batch_size or 0)
        return self._session.run(["logits"], {"input": padded})[0][: len(images)]
