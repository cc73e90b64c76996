"""Offline ranges against what torch computes."""

import numpy as np
import onnx
import pytest
import torch

from qswin.calib.calibrators import Histogram, find_range
from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.offline import activation_ranges, value_sources
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from tests.helpers import SMALL, V1, small_swin

DESCRIPTION = Description({"name": V1, "num_classes": 5, **SMALL}, "float", Preprocessing(size=(32, 32)))


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    save_onnx(path, export_onnx(small_swin(), DESCRIPTION, "fp32", opset=17), DESCRIPTION.to_dict())
    return onnx.load(path)


@pytest.mark.parametrize("algorithm", ["minmax", pytest.param("entropy2", marks=pytest.mark.slow)])
def test_ranges_are_those_of_torchs_activations(graph, algorithm):
    """Whatever the batches: of the input, the first normalization's output and the logits."""
    model, images = small_swin().eval(), torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    seen = {"input": images}
    handle = model.patch_embed.norm.register_forward_hook(lambda _, __, output: seen.update(layer_norm=output))
    with torch.no_grad():
        seen["logits"] = model(images)
    handle.remove()
    ranges = activation_ranges("a.onnx", graph, (batch.numpy() for batch in images.split(4)), algorithm)
    for name, values in seen.items():
        histogram = Histogram()
        histogram.add(values.numpy())
        expected = find_range(histogram, {"minmax": "max", "entropy2": "entropy"}[algorithm])
        assert ranges[name] == pytest.approx(expected, rel=1e-3), name


def test_moved_values_have_their_sources_range(graph):
    sources = value_sources(graph)
    moved = next(node for node in graph.graph.node if node.op_type == "Transpose" and node.input[0] in sources)
    assert sources[moved.output[0]] == sources[moved.input[0]]
    ranges = activation_ranges("a.onnx", graph, [np.ones((1, 3, 32, 32), np.float32)], "minmax")
    assert ranges[moved.output[0]] == ranges[sources[moved.output[0]]]


def test_bad_calibration_data_is_an_error(graph):
    with pytest.raises(ValueError, match="0 images"):
        activation_ranges("a.onnx", graph, [], "minmax")
    with pytest.raises(ValueError, match="input: a value is nan"):
        activation_ranges("a.onnx", graph, [np.full((1, 3, 32, 32), np.nan, np.float32)], "minmax")
