"""Latency is measured of the model that is asked about."""

import onnx
import pytest
import torch

from qswin.qat.backends.registry import time_model
from qswin.qat.checkpoint import read_description
from qswin.qat.mixed_precision import latency
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.rewrite import disable
from qswin.trt.engines.cuda import find_gpu
from tests.helpers import scale_channels, twin_of


@pytest.mark.slow
def test_latency_is_measured_of_the_mixed_model(probe, checkpoint, monkeypatch, tmp_path):
    """The graph that is timed holds as many pairs of Q and DQ as sites are quantized."""
    seen = []

    def timed(path, *given):
        graph = onnx.load(path).graph
        seen.append(sum(node.op_type == "QuantizeLinear" for node in graph.node))
        yield from time_model(path, *given)

    monkeypatch.setattr(latency, "time_model", timed)
    description = read_description(checkpoint)
    groups = [quantizer.site.removesuffix(".weight") for quantizer in quantizers(probe.model)]
    activations = {quantizer.site for quantizer in quantizers(probe.model) if not quantizer.site.endswith(".weight")}
    first = next(site for site in groups if site.endswith("qkv"))
    measured = latency.latencies(
        probe.model, description, [[first], groups], "onnxruntime", 2, tmp_path / "timing.cache"
    )
    assert all(measured(count) > 0 for count in (1, 2, 1))
    assert seen == [len(activations) - 1, 0]


def test_a_site_in_float_keeps_what_its_layer_computes(images):
    """Its weight was divided by channel scales that go with the quantizer."""
    twin = twin_of(images)
    scale_channels(twin, images, "fc2")
    disable(twin, quiet=True)
    mixed = latency.without_quantizers(twin, {quantizer.site for quantizer in quantizers(twin)})
    with torch.inference_mode():
        torch.testing.assert_close(mixed(images), twin(images))


@pytest.mark.gpu
def test_engines_of_mixed_models_are_timed(probe, checkpoint, tmp_path):
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    if find_gpu() is None:
        pytest.skip("there is no GPU")
    groups = [[quantizer.site.removesuffix(".weight")] for quantizer in quantizers(probe.model)]
    cache = tmp_path / "timing.cache"
    measured = latency.latencies(probe.model, read_description(checkpoint), groups, "tensorrt", 2, cache)
    assert all(0 < measured(count) < 100 for count in (0, 1, len(groups)))
    assert cache.is_file()
