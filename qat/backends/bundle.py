"""The target `bundle`: a calibrated checkpoint as one file of our kernels (.qsb), built anywhere and run without torch.

A bundle holds machine code: load only bundles you built yourself. docs/bundle.md describes the file and its runner.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qswin.calib.data.batches import fill_up
from qswin.calib.data.images import Preprocessing
from qswin.calib.reading import read_regular
from qswin.calib.validation import Name, Task, shown, take
from qswin.qat.backends.findings import Finding
from qswin.qat.backends.on_stream import event_timers
from qswin.qat.backends.registry import Backend, Listing, OpenOptions
from qswin.qat.bundle import runner
from qswin.qat.bundle.contents import ARCHITECTURES, Bundle, TensorAt
from qswin.qat.bundle.reader import read_bundle
from qswin.qat.bundle.runner import Context, Runner
from qswin.trt.engines.cuda import Stopwatch, find_gpu
from qswin.trt.engines.layers import Layer, layer_table
from qswin.trt.evaluation.timing import Subject, Timer, TimingOptions, parse_batch_sizes, wall_clock

SUFFIX = ".qsb"
TARGET = "bundle"
KIND = "bundle"
LARGEST_FILE = 16 << 30
PRECISIONS = ("int8", "fp8", "best")


def parse_architectures(text: str) -> tuple[int, ...]:
    """(80, 90) of "80,90". Raises ValueError for anything but architectures that the kernels are compiled for."""
    known = {str(arch): arch for arch in ARCHITECTURES}
    if unknown := [name for name in text.split(",") if name not in known]:
        raise ValueError(f"--arch {shown(unknown[0])}: give some of {','.join(known)}")
    return tuple(sorted({known[name] for name in text.split(",")}))


@dataclasses.dataclass(frozen=True)
class BundleOptions:
    """How to build a bundle. The names are those of the flags of `qswin build`.

    Attributes:
        precision: int8 or fp8, of which the checkpoint must be; best stands for the checkpoint's.
        batch_sizes: that it is for; each has launches of its own.
        arch: architectures that it holds code for; None stands for those of 80, 86, 89 and 90 that have the precision.
    """

    target: str = TARGET
    precision: str = "best"
    batch_sizes: tuple[int, ...] = (1, 64)
    arch: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            what = f"is not for --target {TARGET}, which builds int8 or fp8 of a --checkpoint"
            raise ValueError(f"--precision {self.precision} {what}")


@dataclasses.dataclass(frozen=True)
class Described:
    """What running a bundle takes of its manifest."""

    engine_precision: Name
    preprocessing: Preprocessing
    task: Task
    classes: list[str] | None


class BundlePredictor:
    """A bundle that is read, for a way to run it; a qswin.trt.evaluation.evaluate.Predictor.

    Attributes:
        data: the file's bytes.
        bundle: what they hold.
        batch_sizes: that it is for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no bundle, or was changed.
    """

    def __init__(self, path: Path) -> None:
        self.data = read_regular(path, LARGEST_FILE)
        self.bundle = read_bundle(self.data, str(path))
        described = take(self.bundle.manifest.model, Described, f"{path}: its manifest")
        self.batch_sizes = [batch.size for batch in self.bundle.batches]
        self.backend = TARGET
        self.precision = described.engine_precision
        self.preprocessing = described.preprocessing
        self.task: str = described.task
        self.classes = described.classes
        self.batch_size: int | None = self.batch_sizes[-1]

    def run(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32 -> (N, classes) float32, N being one of `batch_sizes`."""
        raise NotImplementedError

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32 -> (N, classes) float32, filled up to the next batch size."""
        size = next((size for size in self.batch_sizes if size >= len(images)), None)
        if size is None:
            raise ValueError(
                f"batch {len(images)}: the bundle takes up to {self.batch_sizes[-1]}; build it with others"
            )
        return self.run(fill_up(images, size))[: len(images)]


class InterpretedBundle(BundlePredictor):
    """A bundle on the CPU, by the kernels' references in torch: its arithmetic, not its code and not its speed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.backend = f"{TARGET}, interpreted"

    def run(self, images: np.ndarray) -> np.ndarray:
        import torch

        from qswin.qat.bundle.interpreter import interpret

        with torch.inference_mode():
            return interpret(self.bundle, torch.from_numpy(images)).numpy()


class RunningBundle(BundlePredictor):
    """A bundle on the GPU, by the runner in C++, with buffers for one batch size at a time.

    Attributes:
        stream: the CUDA stream's address.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._runner = Runner(self.data)
        from polygraphy.cuda import DeviceArray, Stream

        self.backend = f"{TARGET}, sm_{self._runner.architecture}"
        self._stream, self._images, self._logits = Stream(), DeviceArray(), DeviceArray()
        self.stream: int = self._stream.ptr
        self._contexts: dict[int, Context] = {}
        self._batch = 0

    def load(self, images: np.ndarray) -> None:
        """Copies a batch (N, 3, H, W) float32 to the GPU, N being one of `batch_sizes`: later runs use it."""
        self._batch = len(images)
        if self._batch not in self._contexts:
            self._contexts[self._batch] = self._runner.context(self._batch)
        self._logits.resize((self._batch, self.bundle.classes))
        self._images.resize(images.shape)
        self._images.copy_from(np.ascontiguousarray(images, dtype=np.float32), self._stream)

    def enqueue(self) -> None:
        """Puts one inference of the loaded batch on the stream."""
        self._contexts[self._batch].enqueue(self.stream, self._images.ptr, self._logits.ptr)

    def run(self, images: np.ndarray) -> np.ndarray:
        self.load(images)
        self.enqueue()
        logits = np.empty(self._logits.shape, dtype=np.float32)
        self._logits.copy_to(logits, self._stream)
        self._stream.synchronize()
        return logits


class BundleSubject(Subject):
    """A bundle, of whose batch sizes it is timed alone."""

    def __init__(self, path: Path, predictor: BundlePredictor, device: str) -> None:
        row = {"model": path.name, "backend": predictor.backend, "precision": predictor.precision}
        self.row, self.preprocessing = {**row, "device": device}, predictor.preprocessing
        self.batch_sizes = predictor.batch_sizes


class InterpretedSubject(BundleSubject):
    """A bundle that is interpreted, by the wall clock."""

    cpu_warmup = 1

    def __init__(self, path: Path) -> None:
        self.predictor = InterpretedBundle(path)
        super().__init__(path, self.predictor, "CPU")

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        yield "", wall_clock(lambda: self.predictor.run(images))


class RunningSubject(BundleSubject):
    """A bundle with its input on the GPU, by CUDA events."""

    def __init__(self, path: Path) -> None:
        self.predictor, gpu = RunningBundle(path), find_gpu()
        assert gpu is not None  # else the runner raises
        super().__init__(path, self.predictor, gpu.name)
        self._watch = Stopwatch(self.predictor.stream)

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        return event_timers(self.predictor, self._watch, images, cuda_graph)


def launches(bundle: Bundle) -> list[Layer]:
    """The launches of a bundle's largest batch: their kernels and grids, their operators, and the types of tensors."""
    layers = []
    for launch, call in zip(bundle.batches[-1].launches, bundle.manifest.calls[-1], strict=True):
        name = f"{bundle.manifest.kernels[launch.kernel].function} {'x'.join(map(str, launch.grid))}"
        inputs = (tensor_type(a) for a in call.arguments if isinstance(a, TensorAt))
        operator = call.operator.removeprefix("qswin::")
        layers.append(Layer(name, operator, (), tuple(inputs), (tensor_type(call.result),)))
    return layers


def tensor_type(tensor: TensorAt) -> str:
    """int8, fp16, ...: as layers of engines name it."""
    return {"float16": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8"}.get(tensor.dtype, tensor.dtype)


class BundleBackend(Backend):
    name = TARGET
    suffixes = (SUFFIX,)
    targets = (TARGET,)
    sources = {"checkpoint": BundleOptions}
    kind = KIND

    def open(self, path: Path, options: OpenOptions) -> BundlePredictor:
        """On the GPU; with --device cpu, interpreted."""
        return InterpretedBundle(path) if options.device == "cpu" else RunningBundle(path)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        yield InterpretedSubject(path) if opening.device == "cpu" else RunningSubject(path)

    def listing(self, path: Path, time: bool) -> Listing:
        """The launches of the largest batch."""
        if time:
            raise ValueError(f"{path}: --time is for engines; qswin bench times a bundle")
        layers = launches(read_bundle(read_regular(path, LARGEST_FILE), str(path)))
        return Listing("layers", [dataclasses.asdict(layer) for layer in layers], layer_table(layers))

    def parse_batch_sizes(self, text: str) -> tuple[int, ...]:
        return tuple(sorted(set(parse_batch_sizes(text))))

    def build(self, source: Path, output: Path, options: BundleOptions) -> tuple[bytes, dict[str, Any]]:
        from qswin.qat.bundle.build import build_bundle

        return build_bundle(source, options.precision, options.arch, options.batch_sizes)

    def findings(self) -> list[Finding]:
        try:
            runner.library()
        except ValueError:
            return [Finding(runner.LIBRARY, None, f"to run bundles: {runner.HOW}")]
        return [Finding(runner.LIBRARY, "found", "bundles")]


BACKEND = BundleBackend()
