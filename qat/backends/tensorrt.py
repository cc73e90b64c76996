"""Engines of TensorRT and TensorRT-RTX."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from qswin.calib.files import version_of
from qswin.calib.reading import read_regular
from qswin.calib.validation import take
from qswin.qat.backends.bundle import LARGEST_FILE, Described
from qswin.qat.backends.findings import Finding
from qswin.qat.backends.on_stream import event_timers
from qswin.qat.backends.registry import Backend, Listing, OpenOptions
from qswin.qat.bundle.reader import read_bundle
from qswin.trt.engines.build import build_engine
from qswin.trt.engines.cuda import Stopwatch, find_gpu
from qswin.trt.engines.engine import KIND, SUFFIXES, Engine
from qswin.trt.engines.layers import engine_layers, layer_table, timed_layers
from qswin.trt.engines.options import BuildOptions
from qswin.trt.engines.plugin_network import Classifier, PluginOptions, build_plugin_engine
from qswin.trt.engines.version import INSTALL, TARGETS, capabilities
from qswin.trt.evaluation.compare import engine_activations
from qswin.trt.evaluation.timing import Subject, Timer, TimingOptions

DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt_rtx_cu13_bindings",),
}


class EngineSubject(Subject):
    """An engine with its input on the GPU, by CUDA events."""

    def __init__(self, path: Path) -> None:
        self.engine, gpu = Engine(path), find_gpu()
        assert gpu is not None  # else Engine raises
        engine = self.engine
        self.row = {"model": path.name, "backend": engine.backend, "precision": engine.precision, "device": gpu.name}
        self.preprocessing, self.smallest, self.largest = engine.preprocessing, engine.smallest, engine.largest
        self.batch_sizes = engine.batch_sizes
        self._watch = Stopwatch(engine.stream)

    def timers(self, images: np.ndarray, cuda_graph: bool) -> Iterator[tuple[str, Timer]]:
        return event_timers(self.engine, self._watch, images, cuda_graph)


class TensorRTBackend(Backend):
    name = "tensorrt"
    suffixes = SUFFIXES
    targets = TARGETS
    sources = {"onnx": BuildOptions, "bundle": PluginOptions}
    kind = KIND

    def open(self, path: Path, options: OpenOptions) -> Engine:
        return Engine(path)

    def subjects(self, path: Path, opening: OpenOptions, timing: TimingOptions) -> Iterator[Subject]:
        yield EngineSubject(path)

    def listing(self, path: Path, time: bool) -> Listing:
        engine = Engine(path)
        layers = timed_layers(engine) if time else engine_layers(engine.engine)
        return Listing("layers", [dataclasses.asdict(layer) for layer in layers], layer_table(layers))

    def activations(
        self, path: Path, reference: Path, images: np.ndarray, opening: OpenOptions
    ) -> dict[str, np.ndarray]:
        return engine_activations(path, reference, images)

    def build(self, source: Path, output: Path, options: BuildOptions | PluginOptions) -> tuple[bytes, dict[str, Any]]:
        """TensorRT keeps its measured tactics in timing.cache beside the engine; TensorRT-RTX measures none."""
        if isinstance(options, PluginOptions):
            return build_from_bundle(source, options)
        if options.timing_cache is None and options.target == "tensorrt":
            options = dataclasses.replace(options, timing_cache=output.with_name("timing.cache"))
        engine, sidecar = build_engine(source, options)
        for node, instead in sidecar["not_honoured"].items():
            logging.warning("override not honoured: %s is %s", node, instead)
        return engine, sidecar

    def findings(self) -> list[Finding]:
        return [finding(target) for target in TARGETS]


def build_from_bundle(path: Path, options: PluginOptions) -> tuple[bytes, dict[str, Any]]:
    """An engine whose one layer is a bundle, and what its sidecar says of it. Raises as `build_plugin_engine` does."""
    start, data = time.perf_counter(), read_regular(path, LARGEST_FILE)
    bundle = read_bundle(data, str(path))
    take(bundle.manifest.model, Described, f"{path}: its manifest")  # what an engine could not be run with is not built
    held = tuple(batch.size for batch in bundle.batches)
    engine, profile, tensorrt = build_plugin_engine(path, Classifier(data, bundle.image, held), options)
    gpu = find_gpu()
    assert options.plugin is not None and gpu is not None  # else it raises
    return engine, {
        **bundle.manifest.model,
        "bundle": path.name,
        "bundle_sha256": hashlib.sha256(data).hexdigest(),
        "target": tensorrt.target,
        "version": tensorrt.version,
        "gpu": gpu.name,
        "capability": gpu.capability,
        "plugin": options.plugin.name,
        "profile": profile,
        "batch_sizes": [batch for batch in held if profile[0] <= batch <= profile[2]],
        "seconds": round(time.perf_counter() - start, 1),
    }


def finding(target: str) -> Finding:
    """A TensorRT, and what its version allows."""
    found = next((version for version in map(version_of, DISTRIBUTIONS[target]) if version), None)
    if found is None:
        return Finding(target, None, f"to build engines: {INSTALL[target]}")
    can = capabilities(target, found)
    notes = [
        "weak typing" if can.weak_typing else "strong typing only",
        "calibration caches" if can.implicit_int8 else "no calibration caches",
        "builds on its GPU" if can.needs_gpu else "builds on any machine",
        f"opset {can.newest_opset} at most",
    ]
    return Finding(target, found, ", ".join(notes))


BACKEND = TensorRTBackend()
