"""Swin V2 in FP16 and INT8, layer by layer in ONNX Runtime, with weights as large as trained ones.

ONNX Runtime's CPU kernels compute FP16 graphs in float32, where nothing overflows. The half graphs run in ONNX's
reference evaluator, whose arithmetic is NumPy's FP16; what they should give comes from ONNX Runtime, in float32.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator

from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.offline import activations, value_sources
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from qswin.qat.quant.twins import swin
from qswin.trt.engines.precision import resolve_overrides
from qswin.trt.evaluation.compare import first_parting, graph_activations, layer_errors, relative_error
from qswin.trt.graphs.files import read_onnx
from qswin.trt.graphs.half_precision import write_half_precision
from qswin.trt.graphs.runtime import OnnxRuntimePredictor
from tests.helpers import V2, small_swin

pytestmark = pytest.mark.slow  # the reference evaluator is NumPy in Python
PREPROCESSING = Preprocessing(size=(32, 32))


def trained_like() -> torch.nn.Module:
    """q and k of hundreds, logit scales up to V2's largest, 100, and an MLP whose output the norm after it tames."""
    model = small_swin(V2, depths=[2, 1])
    rng = torch.Generator().manual_seed(4)
    for module in model.modules():
        if hasattr(module, "logit_scale"):
            module.logit_scale.data.uniform_(np.log(10), np.log(200), generator=rng)  # the model clamps it to log(100)
            module.qkv.weight.data *= 3000
        if hasattr(module, "fc2"):
            module.fc2.weight.data *= 20000
    return model


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    """fp32.onnx and int8.onnx of our twin, and plain.onnx, whose cosine attention is torch's F.normalize."""
    folder, recipe = tmp_path_factory.mktemp("v2"), named_recipe("full")
    twin = quantize(trained_like(), recipe)
    find_ranges(twin, [torch.from_numpy(images)])
    description = Description({"name": V2, "num_classes": 5}, "ptq", PREPROCESSING, recipe=recipe)
    for precision in ("fp32", "int8"):
        save_onnx(folder / f"{precision}.onnx", export_onnx(twin, description, precision), description.to_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swin, "_normalize", lambda x: F.normalize(x, dim=-1))
        save_onnx(folder / "plain.onnx", export_onnx(twin, description, "fp32"), description.to_dict())
    return folder


def half_errors(source: Path, overrides: list[str], images: np.ndarray) -> list[tuple[str, float]]:
    """(tensor, relative error) of every activation of the graph in FP16, against the float32 graph's."""
    graph = read_onnx(source)
    half = write_half_precision(graph, resolve_overrides(graph, overrides))
    made = {name for node in half.graph.node for name in node.output}
    names = [name for name in value_sources(graph) if name in made]
    expected = activations("graph", graph, names, images)
    half.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "logits")
    with np.errstate(all="ignore"):
        values = ReferenceEvaluator(half).run(names, {"input": images})
    return [(name, relative_error(np.asarray(v), expected[name])) for name, v in zip(names, values, strict=True)]


LAYER_NORM = "LayerNormalization=fp32"  # as backends compute it that have the node: TensorRT, ONNX Runtime, torch


@pytest.mark.parametrize(
    ("graph", "override"), [("fp32", LAYER_NORM), ("fp32", "swinv2-fp16"), ("plain", "swinv2-fp16")]
)
def test_every_layer_is_right_in_fp16(folder, images, graph, override):
    """Our cosine attention without an override, torch's with the preset."""
    errors = half_errors(folder / f"{graph}.onnx", [override], images)
    assert len(errors) > 100 and first_parting(errors, 0.05).startswith("no tensor")


@pytest.mark.parametrize(
    ("graph", "overrides", "kind"), [("plain", [LAYER_NORM], "ReduceL2"), ("fp32", [], "LayerNormalization")]
)
def test_what_fp16_breaks_is_found_where_it_is(folder, images, graph, overrides, kind):
    source = folder / f"{graph}.onnx"
    makers = {name: node.op_type for node in read_onnx(source).graph.node for name in node.output}
    errors = half_errors(source, overrides, images)
    first = next(name for name, error in errors if error > 0.05)
    assert makers[first] == kind and errors[-1][1] > 0.05


def test_the_int8_graph_is_right_layer_by_layer(folder, images):
    """In ONNX Runtime, against the float graph: quantization's error, which grows slowly and ends small."""
    values = graph_activations(folder / "int8.onnx", folder / "fp32.onnx", images)
    errors = layer_errors(values, folder / "fp32.onnx", images)
    assert len(errors) > 100 and max(error for _, error in errors) < 0.5 and errors[-1][1] < 0.2


def test_both_forms_of_cosine_attention_are_the_same(folder, images):
    plain, ours = (OnnxRuntimePredictor(folder / f"{graph}.onnx")(images) for graph in ("plain", "fp32"))
    assert relative_error(plain, ours) < 1e-4
