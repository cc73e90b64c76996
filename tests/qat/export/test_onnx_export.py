"""Exported graphs against ONNX's checker, ONNX Runtime and torch."""

import copy
import dataclasses
import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from qswin.calib import grid
from qswin.calib.data.images import Preprocessing
from qswin.calib.trt_cache.session import Session
from qswin.models.registry import build_model
from qswin.qat.checkpoint import Description
from qswin.qat.export.onnx_export import export_onnx, save_onnx
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import RECIPES, named_recipe
from qswin.qat.quant.rewrite import disable, enable, quantize
from tests.helpers import SMALL, V1, V2, scale_channels, small_swin

SLOW = pytest.mark.slow  # an export takes ten seconds; those at opset 17 that no other test here needs
RECIPE = named_recipe("full")
DESCRIPTION = Description({"name": V1, "num_classes": 5, **SMALL}, "ptq", Preprocessing(size=(32, 32)), recipe=RECIPE)
FLOAT = dataclasses.replace(DESCRIPTION, recipe=None, stage="float")


def calibrated(model, images, recipe=RECIPE):
    twin = quantize(model, recipe)
    find_ranges(twin, [images])
    return twin


@functools.cache
def model_and_graph(
    name: str = V1, precision: str = "int8", opset: int = 20, scaled: tuple[str, ...] = ()
) -> tuple[torch.nn.Module, onnx.ModelProto]:
    """The small Swin, calibrated for int8, and its graph. Exporting takes seconds, so each graph is made once.

    Args:
        scaled: what the paths of layers end with that get channel scales; the model is then a calibrated one.
    """
    torch.manual_seed(0)
    model, images = small_swin(name), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    quantized = precision == "int8" or bool(scaled)
    if quantized:
        model = calibrated(model, images)
        scale_channels(model, images, *scaled)
    return model, saved(export_onnx(model, DESCRIPTION if quantized else FLOAT, precision, opset))


def saved(graph) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.onnx"
        save_onnx(file, graph, DESCRIPTION.to_dict())
        model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, images: torch.Tensor) -> np.ndarray:
    """The graph as written: without optimizations, which would replace Q/DQ by integer kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": images.numpy()})[0]


@pytest.mark.parametrize(
    ("name", "opset"),
    [pytest.param(V1, 17, marks=SLOW), (V1, 20), pytest.param(V2, 17, marks=SLOW), pytest.param(V2, 20, marks=SLOW)],
)
@torch.no_grad()
def test_float_graphs_agree_with_torch(images, name, opset):
    model, graph = model_and_graph(name, "fp32", opset)
    np.testing.assert_allclose(run(graph, images), model(images).numpy(), atol=1e-4)
    assert graph.opset_import[0].version == opset


@pytest.mark.parametrize(
    ("name", "opset"),
    [pytest.param(V1, 17, marks=SLOW), (V1, 20), pytest.param(V2, 17, marks=SLOW), pytest.param(V2, 20, marks=SLOW)],
)
@torch.no_grad()
def test_int8_graphs_agree_with_torch(images, name, opset):
    """A value on the edge of two levels may round either way; apart from that the graph computes what torch does."""
    twin, graph = model_and_graph(name, "int8", opset)
    expected = twin(images).numpy()
    disable(float_twin := copy.deepcopy(twin), quiet=True)
    quantization_error = np.median(np.abs(expected - float_twin(images).numpy()))
    assert np.median(np.abs(run(graph, images) - expected)) < 0.1 * quantization_error
    assert graph.opset_import[0].version == opset


SCALED = {V1: ("fc2", "head.fc"), V2: ("qkv", "fc1", "fc2", "reduction", "head.fc")}


@pytest.mark.parametrize(
    ("name", "opset"),
    [(V1, 20), *(pytest.param(*each, marks=SLOW) for each in ((V1, 17), (V2, 17), (V2, 20)))],
)
@torch.no_grad()
def test_channel_scales_are_one_mul_before_the_pair(images, name, opset):
    twin, graph = model_and_graph(name, "int8", opset, SCALED[name])
    expected = twin(images).numpy()
    disable(float_twin := copy.deepcopy(twin), quiet=True)
    quantization_error = np.abs(expected - float_twin(images).numpy()).mean()
    assert np.abs(run(graph, images) - expected).mean() < 0.1 * quantization_error

    kinds, plain = (Counter(n.op_type for n in g.graph.node) for g in (graph, model_and_graph(name, "int8", opset)[1]))
    scales = {i.name for i in graph.graph.initializer if i.name.endswith("_pre_quant_scale")}
    assert len(scales) == {V1: 4 + 1, V2: 4 * 3 + 2}[name]
    assert kinds["Mul"] - plain["Mul"] == len(scales)
    shared = 4 if name == V2 else 0  # a scaled fc1 no longer reads what add2.shortcut does
    assert kinds - plain == Counter(Mul=len(scales), QuantizeLinear=shared, DequantizeLinear=shared)
    readers = {input: node.op_type for node in graph.graph.node for input in node.input}
    products = [node.output[0] for node in graph.graph.node if scales & set(node.input)]
    assert [readers[product] for product in products] == ["QuantizeLinear"] * len(scales)


@SLOW
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("fp16", 0.02)])
@torch.no_grad()
def test_float_graphs_have_channel_scales_in_their_weights(images, precision, atol):
    twin, graph = model_and_graph(V1, precision, 20, SCALED[V1])
    np.testing.assert_allclose(run(graph, images), small_swin_logits(images), atol=atol)
    assert Counter(n.op_type for n in graph.graph.node) == Counter(
        n.op_type for n in model_and_graph(V1, precision)[1].graph.node
    )
    assert sum(key.endswith("_pre_quant_scale") for key in twin.state_dict()) == 5  # the twin keeps its own


def small_swin_logits(images):
    """The logits of the model that `model_and_graph` begins with."""
    torch.manual_seed(0)
    return small_swin()(images).numpy()


@torch.no_grad()
def test_fp16_takes_and_gives_float32(images):
    model, graph = model_and_graph(precision="fp16")
    kinds = {init.data_type for init in graph.graph.initializer if len(init.dims)}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    np.testing.assert_allclose(run(graph, images), model(images).numpy(), atol=0.02)


@pytest.mark.parametrize(
    ("name", "opset"), [pytest.param(V1, 17, marks=SLOW), (V1, 20), pytest.param(V2, 20, marks=SLOW)]
)
def test_each_site_is_one_pair(name, opset):
    twin, graph = model_and_graph(name, "int8", opset)
    counts = Counter(node.op_type for node in graph.graph.node)
    sites = [quantizer.site for quantizer in quantizers(twin)]
    weights = [site for site in sites if site.endswith(".weight")]
    # V2 norms come last, so fc1 and add2.shortcut quantize one tensor in each of the 4 blocks: the pair is shared.
    shared = 4 if name == V2 else 0
    assert counts.pop("DequantizeLinear") == len(sites) - shared
    assert counts.pop("QuantizeLinear") == len(sites) - shared - (len(weights) if opset > 17 else 0)
    _, plain = model_and_graph(name, "fp32", opset)
    assert counts == Counter(node.op_type for node in plain.graph.node)  # nothing else was added


@pytest.mark.parametrize(
    ("opset", "kind"), [pytest.param(17, onnx.TensorProto.FLOAT, marks=SLOW), (20, onnx.TensorProto.INT8)]
)
def test_weights_are_float32_or_int8_by_target(opset, kind):
    twin, graph = model_and_graph(opset=opset)
    stored = {init.name: init for init in graph.graph.initializer}
    sources = [node.input[0] for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {stored[name].data_type for name in sources if name in stored} == {kind}
    linear = twin.layers[0].blocks[0].mlp.fc1
    levels = torch.round(linear.weight / (linear._weight_quantizer._amax / 127))
    weight = numpy_helper.to_array(stored["layers.0.blocks.0.mlp.fc1.weight"])
    expected = levels if opset == 20 else linear.weight
    assert np.array_equal(weight, expected.T.detach().numpy())


def test_dequantized_weights_go_straight_into_their_product():
    graph = model_and_graph()[1].graph
    stored = {init.name for init in graph.initializer}
    weights = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    users = Counter(node.op_type for node in graph.node if weights & set(node.input))
    assert users == {"MatMul": 17, "Conv": 1, "Gemm": 1}


@pytest.mark.parametrize("name", [V1, pytest.param(V2, marks=SLOW)])
def test_bias_and_mask_are_one_constant(name):
    """Each block adds one tensor to its scores, and nothing computes it."""
    graph = model_and_graph(name, "fp32")[1].graph
    stored = {init.name: tuple(init.dims) for init in graph.initializer}
    added = [stored[i] for node in graph.node if node.op_type == "Add" for i in node.input if i in stored]
    biases = sorted(shape for shape in added if shape[-2:] == (16, 16))
    assert biases == [(1, 2, 16, 16), (1, 4, 16, 16), (4, 4, 16, 16), (16, 2, 16, 16)]
    assert not {"Gather", "GatherND", "Sigmoid", "Relu", "Where", "Pad"} & {node.op_type for node in graph.node}


@torch.no_grad()
def test_batches_are_free_or_fixed(images, quantized):
    _, free = model_and_graph()
    for size in (1, 3):
        assert run(free, images[:size]).shape == (size, 5)
    fixed = saved(export_onnx(quantized, DESCRIPTION, batch=1))
    assert [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    np.testing.assert_allclose(run(fixed, images[:1]), run(free, images[:1]), atol=1e-5)


@pytest.mark.parametrize("bits", [6, 3])
@torch.no_grad()
def test_fewer_bits_are_exact_in_int8_nodes(images, bits):
    recipe = dataclasses.replace(RECIPES["gemm"], weight_format=f"int{bits}", activation_format=f"int{bits}")
    twin = calibrated(small_swin(depths=[1], num_heads=[2]), images, recipe)
    expected = twin(images).numpy()
    graph = saved(export_onnx(twin, dataclasses.replace(DESCRIPTION, recipe=recipe)))
    np.testing.assert_allclose(run(graph, images), expected, atol=0.02 * np.abs(expected).max())


@torch.no_grad()
def test_weights_beyond_their_range_saturate_as_in_torch(images):
    """A learned or loaded range may lie below the largest weight: the narrow grid ends at -127, not at -128."""
    twin = calibrated(small_swin(depths=[1], num_heads=[2]), images)
    for name, buffer in twin.named_buffers():
        if "_weight_quantizer" in name:
            buffer *= 0.3
    graph = saved(export_onnx(twin, DESCRIPTION))
    stored = [
        numpy_helper.to_array(i) for i in graph.graph.initializer if i.data_type == onnx.TensorProto.INT8 and i.dims
    ]
    assert min(array.min() for array in stored) == -127
    expected = twin(images).numpy()
    np.testing.assert_allclose(run(graph, images), expected, atol=0.02 * np.abs(expected).max())


def test_metadata_says_what_the_graph_is():
    _, graph = model_and_graph()
    metadata = json.loads({entry.key: entry.value for entry in graph.metadata_props}["qswin"])
    assert Description.from_dict(metadata) == DESCRIPTION
    assert (graph.graph.input[0].name, graph.graph.output[0].name) == ("input", "logits")
    assert str(Path(__file__).parents[3]) not in str(graph)  # no traces of the machine that exported it


@SLOW
def test_the_model_is_left_as_it_was(images):
    twin = calibrated(small_swin(depths=[1, 1]), images)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    for precision in ("fp16", "int8"):
        export_onnx(twin, DESCRIPTION, precision)
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
    assert all(quantizer.mode.value == "quantizing" for quantizer in quantizers(twin))


def test_what_cannot_be_exported_says_why(images):
    twin = quantize(small_swin(), RECIPE)
    with pytest.raises(ValueError, match="patch_embed: its range was never calibrated"):
        export_onnx(twin, DESCRIPTION)
    find_ranges(twin, [images])
    dead = next(quantizers(twin.head))
    dead._amax.zero_()
    with pytest.raises(ValueError, match="head: its range is dead"):
        export_onnx(twin, DESCRIPTION)
    with pytest.raises(ValueError, match="not quantized: run qswin calibrate"):
        export_onnx(small_swin(), FLOAT)
    with pytest.raises(ValueError, match="opset 16 is too old"):
        export_onnx(small_swin(), FLOAT, "fp32", opset=16)
    with pytest.raises(ValueError, match="int8, fp8, fp32, fp16"):
        export_onnx(small_swin(), FLOAT, "int4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"preprocessing": Preprocessing(size=(48, 48))},
            "does not take an image of 3 x 48 x 48.*preprocessing: .*height",
        ),
        ({"model": {**DESCRIPTION.model, "num_classes": 7}}, "gives 5 classes, but .* num_classes says 7"),
        ({"classes": ("a", "b")}, "gives 5 classes, but .* classes says 2"),
    ],
)
def test_a_description_of_another_model_is_refused_before_tracing(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        export_onnx(small_swin(), dataclasses.replace(FLOAT, **changes), "fp32")
    assert "\n" not in str(caught.value)


def test_a_format_that_onnx_does_not_have_is_named(images, monkeypatch):
    monkeypatch.setattr(grid, "_GRIDS", dict(grid._GRIDS))
    grid.register_grid(grid.IntegerGrid("int9", 9, -256, 255))
    recipe = dataclasses.replace(RECIPES["gemm"], weight_format="int9")
    twin = calibrated(small_swin(depths=[1], num_heads=[2]), images, recipe)
    description = dataclasses.replace(DESCRIPTION, recipe=recipe)
    with pytest.raises(ValueError, match=r"patch_embed\.weight: format 'int9' has no type in ONNX; export .* fp32"):
        export_onnx(twin, description)
    export_onnx(twin, description, "fp32")


def test_an_opset_that_cannot_be_written_is_refused():
    """The exporter would write 18 and say nothing."""
    with pytest.raises(ValueError, match="opset 99 is too new: the newest that the installed onnx knows is"):
        export_onnx(small_swin(), FLOAT, "fp32", 99)


def in_format(number_format, images):
    recipe = named_recipe(f"attention-{number_format}")
    twin = calibrated(small_swin(depths=[1], num_heads=[2]), images, recipe)
    return twin, dataclasses.replace(DESCRIPTION, recipe=recipe)


@torch.no_grad()
def test_fp8_is_computed_by_onnx_runtime_as_by_torch(images):
    """Weights are stored as FP8, next to pairs of FP8, of the opset that first has them."""
    twin, description = in_format("fp8", images)
    graph = saved(export_onnx(twin, description, opset=19))
    kinds = Counter(i.data_type for i in graph.graph.initializer if len(i.dims) > 1)  # weights, not zero points
    assert kinds[onnx.TensorProto.FLOAT8E4M3FN] == sum(1 for q in quantizers(twin) if q.weight_shape is not None)
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {19}
    expected = twin(images).numpy()
    np.testing.assert_allclose(run(graph, images), expected, atol=1e-4 * np.abs(expected).max())


@torch.no_grad()
def test_unsigned_probabilities_are_uint8_nodes(images):
    recipe = named_recipe("attention")
    rule = dataclasses.replace(next(r for r in recipe.rules if r.sites == "attn.probs"), activation_format="uint8")
    recipe = dataclasses.replace(recipe, rules=(*recipe.rules, rule))
    twin = calibrated(small_swin(depths=[1], num_heads=[2]), images, recipe)
    graph = saved(export_onnx(twin, dataclasses.replace(DESCRIPTION, recipe=recipe)))
    unsigned = [i for i in graph.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert len(unsigned) >= 1
    expected = twin(images).numpy()
    np.testing.assert_allclose(run(graph, images), expected, atol=0.02 * np.abs(expected).max())


def test_a_format_needs_its_opset_and_its_precision(images):
    twin, description = in_format("fp8", images)
    with pytest.raises(ValueError, match="patch_embed: format 'fp8' needs opset 19 or newer, not 17; TensorRT 8.x"):
        export_onnx(twin, description, opset=17)
    with pytest.raises(ValueError, match="quantized to fp8, not int8; leave --precision out"):
        export_onnx(twin, description, "int8")


@functools.cache
def backbone(padding: str = "timm") -> tuple[torch.nn.Module, Description]:
    """A small backbone for any image size, calibrated."""
    settings = {**SMALL, "depths": [2, 1], "out_features": ["stage1", "stage2"], "padding": padding}
    torch.manual_seed(0)
    twin = quantize(build_model(V1, **settings), named_recipe("attention"))
    find_ranges(twin, [torch.randn(4, 3, 32, 32), torch.randn(1, 3, 44, 36)])
    return twin, Description({"name": V1, **settings}, "ptq", Preprocessing(size=(44, 36)), recipe=twin.recipe)


def assert_same_maps(graph: onnx.ModelProto, model: torch.nn.Module, size: tuple[int, int]) -> None:
    """Of ONNX Runtime and torch: almost all values are equal, and the others fell on another level somewhere."""
    images = torch.randn(2, 3, *size)
    session = Session("graph", graph.SerializeToString())
    with torch.no_grad():
        expected = model(images)
    assert [output.name for output in session.session.get_outputs()] == list(expected)
    found = session.run(list(expected), images.numpy())
    for ours, theirs in zip(found, expected.values(), strict=True):
        error = np.abs(ours - theirs.numpy())
        assert ours.shape == theirs.shape and error.mean() < 0.002 * theirs.std().item()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_backbone_of_one_size_gives_feature_maps(precision):
    twin, description = backbone()
    graph = saved(export_onnx(twin, description, precision))
    disable(twin, quiet=True) if precision == "fp32" else enable(twin)
    assert_same_maps(graph, twin, (44, 36))
    sides = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[2:]]
    assert sides == [44, 36]


def test_windows_that_are_padded_first_need_a_graph_for_each_size():
    twin, description = backbone("torchvision")
    with pytest.raises(ValueError, match="not to be had of padding='torchvision': export a graph for each size"):
        export_onnx(twin, description, any_size=True)


@SLOW  # tracing for any size takes a minute
def test_a_backbone_of_any_size_is_one_graph():
    twin, description = backbone()
    with pytest.raises(ValueError, match=r"images of 64 pixels or more, not \(44, 36\)"):
        export_onnx(twin, description, any_size=True)
    description = dataclasses.replace(description, preprocessing=Preprocessing(size=(72, 96)))
    enable(twin)
    graph = saved(export_onnx(twin, description, any_size=True))
    for size in ((72, 96), (64, 96), (100, 68), (128, 128)):
        assert_same_maps(graph, twin, size)


def test_a_classifier_takes_one_size():
    with pytest.raises(ValueError, match="takes images of 32 x 32 only; a backbone"):
        export_onnx(small_swin(), FLOAT, "fp32", any_size=True)
