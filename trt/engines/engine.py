"""A built engine: its sidecar, whether it fits this machine, and running it. No torch.

An engine is code: load only engines you built yourself.
"""

import dataclasses
from pathlib import Path

import numpy as np

from qswin.calib.data.batches import fill_up, joined
from qswin.calib.data.images import Preprocessing
from qswin.calib.files import read_sidecar
from qswin.calib.validation import Count, Name, Task, take
from qswin.trt.engines.cuda import Gpu, find_gpu
from qswin.trt.engines.plugin import check_loaded
from qswin.trt.engines.version import TensorRT, find_tensorrt

KIND = "engine"
SUFFIXES = (".engine", ".plan")
REMEDY = "build it again with qswin build"
NO_RTX = ("9.0", "10.0", "10.3")  # compute capabilities of data-centre GPUs that TensorRT-RTX does not run on


@dataclasses.dataclass(frozen=True)
class Built:
    """What running a built model takes of its sidecar, which says more.

    Attributes:
        target: TensorRT, TensorRT-RTX or inductor, as `qswin build --target` calls it; `version` is the library's.
        capability: the GPU's, "9.0".
        profile: the smallest, the usual and the largest batch.
        plugin: the library with the engine's layers, if TensorRT lacks them.
        batch_sizes: that it takes, if those alone.
    """

    target: str
    version: str
    capability: str
    profile: tuple[Count, Count, Count]
    engine_precision: str
    preprocessing: Preprocessing
    task: Task
    classes: list[str] | None
    plugin: Name | None = None
    batch_sizes: tuple[Count, ...] | None = None


def check_fits(path: Path, sidecar: Built, tensorrt: TensorRT, gpu: Gpu | None) -> None:
    """Raises ValueError when this TensorRT or this GPU cannot run the engine, before TensorRT's own error does."""
    if tensorrt.version != sidecar.version:
        raise ValueError(
            f"{path}: built by {tensorrt.target} {sidecar.version}, here is {tensorrt}; build it again here"
        )
    if gpu is None:
        raise ValueError(f"{path}: running an engine needs an NVIDIA GPU and its driver; evaluate the .onnx file here")
    if tensorrt.target == "tensorrt-rtx" and gpu.capability in NO_RTX:
        raise ValueError(
            f"{path}: {tensorrt} does not run on compute capability {gpu.capability}; build with --target tensorrt"
        )
    if gpu.capability != sidecar.capability:
        raise ValueError(
            f"{path}: built for compute capability {sidecar.capability}, {gpu.name} has {gpu.capability};"
            " build it again"
        )


class BuiltModel:
    """What `qswin build` wrote beside a built model, as a qswin.trt.evaluation.evaluate.Predictor shows it.

    Args:
        kind: of the file, as its sidecar says it: "engine" or "package".
        data: the file's content, where it has been read.

    Attributes:
        sidecar: what running the model takes of it.
        smallest, largest: the batches that it takes.
        batch_sizes: those that it takes alone; None for all between the two.

    Raises:
        FileNotFoundError: the model or its sidecar is missing.
        ValueError: the sidecar is malformed, or it is another file's.
    """

    def __init__(self, path: Path, kind: str, data: bytes | None = None) -> None:
        keys = [field.name for field in dataclasses.fields(Built) if field.default is dataclasses.MISSING]
        values = read_sidecar(path, kind, keys, REMEDY, data)
        self.sidecar = sidecar = take(values, Built, f"{path}: its sidecar", REMEDY)
        self.smallest, _, self.largest = sidecar.profile
        self.batch_sizes = sidecar.batch_sizes
        self.backend = f"{sidecar.target} {sidecar.version}"
        self.precision = sidecar.engine_precision
        self.preprocessing = sidecar.preprocessing
        self.task: str = sidecar.task
        self.classes: list[str] | None = sidecar.classes
        self.batch_size: int | None = self.largest

    def next_size(self, count: int) -> int:
        """The smallest batch of `count` images or more that it takes; `count` where it takes none."""
        held = self.batch_sizes or (self.smallest, max(count, self.smallest))
        return next((size for size in held if size >= count), count)


class Engine(BuiltModel):
    """A deserialized engine with GPU buffers for one batch size at a time; a qswin.trt.evaluation.evaluate.Predictor.

    Attributes:
        engine: TensorRT's ICudaEngine.
        context: its IExecutionContext.
        stream: the CUDA stream's address.

    Raises:
        FileNotFoundError: the engine or its sidecar is missing.
        ValueError: it does not fit this machine, or its layers are in a plugin that is not loaded.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        data = path.read_bytes() if path.is_file() else b""
        super().__init__(path, KIND, data)
        check_fits(path, self.sidecar, find_tensorrt(self.sidecar.target), find_gpu())
        if self.sidecar.plugin is not None:
            check_loaded(path)
        from polygraphy.backend.trt import engine_from_bytes
        from polygraphy.cuda import DeviceArray, Stream

        self.engine = engine_from_bytes(data)
        self.context = self.engine.create_execution_context()
        self._stream = Stream()
        self.stream: int = self._stream.ptr
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self._buffers = {name: DeviceArray() for name in names}
        self._outputs = [name for name in names if name != "input"]
        self._batch = 0

    def load(self, images: np.ndarray) -> None:
        """Copies a batch (N, 3, H, W) float32 to the GPU: later runs use it. Raises ValueError outside the profile."""
        self._bind(len(images))
        self._buffers["input"].copy_from(np.ascontiguousarray(images), self._stream)

    def _bind(self, batch: int) -> None:
        """Sets the batch size of what follows, and makes room for it."""
        if batch not in (self.batch_sizes or range(self.smallest, self.largest + 1)):
            taken = f"{self.smallest} to {self.largest}"
            if self.batch_sizes is not None:
                taken = ", ".join(map(str, self.batch_sizes))
            raise ValueError(f"batch {batch}: the engine takes {taken}; build it with other --batch-sizes")
        if batch == self._batch:
            return
        self.context.set_input_shape("input", (batch, *tuple(self.engine.get_tensor_shape("input"))[1:]))
        for name, buffer in self._buffers.items():
            buffer.resize(tuple(self.context.get_tensor_shape(name)))
            self.context.set_tensor_address(name, buffer.ptr)
        self._batch = batch

    def enqueue(self) -> None:
        """Puts one inference of the loaded batch on the stream. Raises ValueError where TensorRT fails."""
        if not self.context.execute_async_v3(self.stream):
            raise ValueError(f"batch {self._batch}: {self.backend} cannot run the engine; its log is above")

    def run_loaded(self) -> None:
        """One inference of the loaded batch, to its end."""
        self.enqueue()
        self._stream.synchronize()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32 -> logits, or `joined` maps, float32; N up to `largest`, filled up to `next_size`."""
        self.load(fill_up(images, self.next_size(len(images))))
        self.enqueue()
        outputs = [np.empty(self._buffers[name].shape, dtype=np.float32) for name in self._outputs]
        for name, output in zip(self._outputs, outputs, strict=True):
            self._buffers[name].copy_to(output, self._stream)
        self._stream.synchronize()
        return joined([output[: len(images)] for output in outputs])
