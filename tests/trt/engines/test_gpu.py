"""What needs TensorRT and a GPU: run where both are, skipped elsewhere."""

from pathlib import Path

import numpy as np
import pytest

from qswin.calib.files import write_with_sidecar
from qswin.trt.engines.build import build_engine
from qswin.trt.engines.calibrate import calibrate_with_tensorrt
from qswin.trt.engines.cuda import Stopwatch, captured, find_gpu
from qswin.trt.engines.engine import KIND, Engine
from qswin.trt.engines.layers import engine_layers, timed_layers
from qswin.trt.engines.options import BuildOptions
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.runtime import OnnxRuntimePredictor

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tensorrt():
    module = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if find_gpu() is None:
        pytest.skip("there is no GPU")
    return module


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)


def built(graph: Path, folder: Path, options: BuildOptions) -> Engine:
    data, sidecar = build_engine(graph, options)
    write_with_sidecar(folder / "a.engine", data, KIND, sidecar)
    return Engine(folder / "a.engine")


@pytest.mark.parametrize(
    ("graph", "precision", "tolerance"),
    [("fp32-17", "fp32", 1e-3), ("fp32-17", "fp16", 0.02), ("int8-17", "int8", 0.1)],
)
def test_engines_agree_with_onnx_runtime(graphs, images, tmp_path, graph, precision, tolerance):
    engine = built(graphs[graph], tmp_path, BuildOptions(precision=precision, batch_sizes=(1, 4, 8), level=1))
    expected = OnnxRuntimePredictor(graphs[graph])(images)
    np.testing.assert_allclose(engine(images), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(engine(images[:1]), engine(images)[:1], rtol=0, atol=tolerance * np.abs(expected).max())
    assert engine_layers(engine.engine) and any(layer.ms for layer in timed_layers(engine))
    with pytest.raises(ValueError, match="takes 1 to 8"):
        engine(np.repeat(images, 3, axis=0))


def test_a_captured_graph_computes_the_same(graphs, images, tmp_path):
    engine = built(graphs["fp32-17"], tmp_path, BuildOptions(precision="fp32", level=1))
    expected = engine(images)
    with captured(engine.enqueue, engine.stream) as launch:
        assert Stopwatch(engine.stream).time(launch) > 0
    np.testing.assert_array_equal(engine(images), expected)


def test_tensorrts_own_cache(graphs, images):
    from qswin.calib.trt_cache.cache_file import parse_cache
    from qswin.calib.trt_cache.native import BatchStream

    graph = read_onnx(graphs["fp32-17"])
    data = calibrate_with_tensorrt(graphs["fp32-17"], graph, "minmax", 4, BatchStream([images], 4))
    assert parse_cache(data)[2]["input"] == pytest.approx(np.abs(images).max(), rel=1e-3)
