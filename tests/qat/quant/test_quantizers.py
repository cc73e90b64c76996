"""TensorQuantizer: states, ranges, what it refuses."""

import copy
import warnings

import numpy as np
import pytest
import torch

from qswin.calib.calibrators import Histogram, find_range
from qswin.calib.data.images import Preprocessing
from qswin.calib.grid import INT8, UINT8, grid_of
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.quant.quantizers import IN_FLOAT, Mode, QuantSpec, TensorQuantizer, quantizers, table
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import disable, enable, quantize
from tests.helpers import SMALL, V1, small_swin


def calibrated(spec: QuantSpec, x: torch.Tensor) -> TensorQuantizer:
    quantizer = TensorQuantizer(spec, "block.fc1")
    quantizer.observe()
    quantizer(x)
    quantizer.set_range_from_histogram()
    quantizer.enable()
    return quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_torch_and_numpy_count_alike(dtype, strided):
    quantizer, histogram = TensorQuantizer(QuantSpec()), Histogram()
    quantizer.observe()
    for scale in (0.01, 3.0, 100.0):
        x = (torch.randn(64, 32) * scale).to(dtype)
        x = x.T[::2] if strided else x
        quantizer(x)
        histogram.add(x.float().numpy())
    assert (quantizer.histogram.counts == histogram.counts).all()
    assert quantizer.histogram.amax == histogram.amax


def test_observing_and_off_pass_the_input_on():
    quantizer, x = TensorQuantizer(QuantSpec()), torch.randn(5)
    assert quantizer(x) is x
    quantizer.observe()
    assert quantizer(x) is x and quantizer.mode is Mode.OBSERVING


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_is_the_specs(bits):
    x = torch.linspace(-1.5, 1.5, 4001)
    quantizer = TensorQuantizer(QuantSpec(grid_of(f"int{bits}"), amax=1.0))
    quantizer.enable()
    qmax = 2 ** (bits - 1) - 1
    levels = quantizer(x).unique() * qmax
    torch.testing.assert_close(levels, torch.arange(-qmax - 1, qmax + 1.0))


def test_weights_leave_out_the_lowest_level():
    quantizer = TensorQuantizer(QuantSpec(grid_of("int4").of_weights, amax=1.0))
    quantizer.enable()
    assert len(quantizer(torch.linspace(-2, 2, 1001)).unique()) == 15


@pytest.mark.parametrize("calibrator", ["max", "percentile:99", "mse", "entropy"])
def test_the_range_is_the_calibrators(calibrator):
    x = torch.from_numpy(np.random.default_rng(0).standard_t(4, 5000).astype(np.float32))
    histogram = Histogram()
    histogram.add(x.numpy())
    quantizer = calibrated(QuantSpec(calibrator=calibrator), x)
    assert quantizer.amax.item() == pytest.approx(find_range(histogram, calibrator))


def test_weights_take_the_largest_magnitude_of_each_channel():
    weight = torch.randn(6, 3, 2, 2)
    quantizer = TensorQuantizer(QuantSpec(INT8.of_weights, axis=0), weight_shape=weight.shape)
    quantizer.set_range_from_weight(weight)
    assert quantizer._amax.shape == (6, 1, 1, 1)
    assert quantizer._amax.flatten().tolist() == [channel.abs().max().item() for channel in weight]


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "never calibrated"), (0.0, "dead"), (float("inf"), "infinite"), (-1.0, "dead")]
)
def test_a_range_that_is_not_one_never_quantizes(value, words):
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer._amax.fill_(value)
    with pytest.raises(ValueError, match=rf"layers\.0\.fc1.*{words}"):
        quantizer.enable()
    assert quantizer.mode is Mode.OFF


def test_values_that_are_not_finite_name_the_site():
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer.observe()
    with pytest.raises(ValueError, match=r"layers\.0\.fc1.*nan"):
        quantizer(torch.tensor([1.0, float("nan")]))


def test_a_weight_that_is_not_finite_names_the_site():
    weight = torch.tensor([[1.0, float("inf")]])
    quantizer = TensorQuantizer(QuantSpec(INT8.of_weights, 0, "percentile"), "fc1.weight", weight.shape)
    with pytest.raises(ValueError, match=r"fc1\.weight: a value is inf"):
        quantizer.set_range_from_weight(weight)


def test_a_site_that_was_never_reached_is_an_error():
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer.observe()
    with pytest.raises(ValueError, match="nothing was observed"):
        quantizer.set_range_from_histogram()


@pytest.mark.parametrize("settings", [{"amax": 0.0}, {"amax": -1.0}, {"calibrator": "none"}])
def test_specs_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError):
        QuantSpec(**settings)


def test_a_learned_range_starts_where_it_was_and_stays_positive():
    x = torch.randn(1000)
    quantizer = calibrated(QuantSpec(grid_of("int4"), calibrator="max"), x).train()
    before, output = quantizer.amax.clone(), quantizer(x)
    quantizer.learn_range()
    torch.testing.assert_close(quantizer(x), output)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=50.0)
    for _ in range(20):
        optimizer.zero_grad()
        ((quantizer(x) - x) ** 2).mean().backward()
        optimizer.step()
        assert quantizer.amax > 0
    assert ((quantizer(x) - x) ** 2).mean() < ((output - x) ** 2).mean() and quantizer.amax < before


def test_the_learned_gradient_is_scaled_as_in_lsq():
    x = torch.randn(1000)
    quantizer = calibrated(QuantSpec(grid_of("int4"), calibrator="max"), x).train()
    quantizer.learn_range()
    gradients = []
    for training in (True, False):
        quantizer.zero_grad()
        quantizer.train(training)(x).sum().backward()
        gradients.append(quantizer._log_gain.grad.item())
    assert gradients[0] == pytest.approx(gradients[1] / (1000 * 7) ** 0.5, rel=1e-4)


def test_freezing_keeps_the_learned_range():
    quantizer = calibrated(QuantSpec(), torch.randn(100))
    quantizer.learn_range()
    with torch.no_grad():
        quantizer._log_gain.fill_(0.5)
    learned = quantizer.amax.item()
    quantizer.freeze_range()
    assert quantizer._amax.item() == pytest.approx(learned) and not list(quantizer.parameters())
    assert list(quantizer.state_dict()) == ["_amax"]


def test_activations_keep_float_values_in_training_with_the_probability_given():
    x = torch.randn(10_000)
    quantizer = calibrated(QuantSpec(grid_of("int4")), x)
    rounded = quantizer(x)
    quantizer.train().keep_float = 0.25
    x.requires_grad_()
    output = quantizer(x)
    kept = output == x
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(output, torch.where(kept, x, rounded)) and not torch.equal(quantizer(x), output)
    output.sum().backward()
    assert (x.grad[kept] == 1).all()
    assert torch.equal(quantizer.eval()(x), rounded)
    weights = calibrated(QuantSpec(grid_of("int4")), x.detach()).train()
    weights.weight_shape, weights.keep_float = x.shape, 0.25
    assert torch.equal(weights(x), rounded)


def test_the_table_lists_every_quantizer(quantized):
    lines = table(quantized).splitlines()
    assert len(lines) == 1 + len(list(quantizers(quantized)))
    rows = [line.split() for line in lines]
    assert any(row[:2] == ["layers.0.blocks.0.attn.probs", "int8"] and row[-1] == "quantizing" for row in rows)


def modes(model) -> set[Mode]:
    return {quantizer.mode for quantizer in quantizers(model)}


@torch.no_grad()
def test_a_calibrated_state_quantizes_where_it_is_loaded(quantized, images):
    fresh = quantize(small_swin(seed=1), named_recipe("full"))
    state = quantized.state_dict()
    assert not [key for key in state if key.endswith("_off")]
    fresh.load_state_dict(state, strict=True)
    assert modes(fresh) == {Mode.QUANTIZING} and torch.equal(fresh.eval()(images), quantized.eval()(images))


@torch.no_grad()
def test_a_state_without_ranges_is_off_where_it_is_loaded(quantized, images):
    uncalibrated = quantize(small_swin(), named_recipe("full"))
    quantized.load_state_dict(uncalibrated.state_dict(), strict=True)
    assert modes(quantized) == {Mode.OFF} and torch.equal(quantized.eval()(images), small_swin()(images))


def test_quantizers_that_were_switched_off_come_back_off(quantized):
    first, second, *_ = quantizers(quantized)
    first.disable()
    second.observe()
    names = [name for name, module in quantized.named_modules() if module in (first, second)]
    state = quantized.state_dict()
    assert sorted(key for key in state if key.endswith("_off")) == sorted(f"{name}._off" for name in names)
    fresh = quantize(small_swin(), named_recipe("full"))
    fresh.load_state_dict(state, strict=True)
    off = [
        name
        for name, module in fresh.named_modules()
        if isinstance(module, TensorQuantizer) and module.mode is Mode.OFF
    ]
    assert off == names and torch.equal(next(quantizers(fresh))._amax, first._amax)
    fresh.load_state_dict(quantize_all(quantized).state_dict(), strict=True)
    assert modes(fresh) == {Mode.QUANTIZING}


def quantize_all(model):
    enable(model)
    return model


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_a_loaded_range_that_is_not_one_does_not_quantize(value, quantized, images):
    state = quantized.state_dict()
    key = next(key for key in state if key.endswith("fc1._input_quantizer._amax"))
    state[key] = torch.full_like(state[key], value)
    fresh = quantize(small_swin(), named_recipe("full"))
    fresh.load_state_dict(state)
    assert fresh.get_submodule(key.removesuffix("._amax")).mode is Mode.OFF
    with pytest.warns(UserWarning, match="computes in float"):
        fresh(images)


def warned(model, images) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model(images)
    return [str(warning.message) for warning in caught if str(warning.message) == IN_FLOAT]


@pytest.mark.parametrize(
    "switch",
    [
        disable,
        lambda model: next(quantizers(model)).disable(),
        lambda model: next(quantizers(model)).observe(),
        lambda model: [quantizer.observe() for quantizer in quantizers(model)],
    ],
    ids=["disabled", "one off", "one observing", "all observing"],
)
def test_a_calibrated_model_that_computes_in_float_says_so_once(quantized, images, switch):
    switch(quantized)
    assert len(warned(quantized, images)) == 1 and not warned(quantized, images)
    enable(quantized)
    assert not warned(quantized, images)


def test_a_model_that_is_calibrated_but_not_switched_on_says_so(images):
    twin = quantize(small_swin(), named_recipe("gemm"))
    for quantizer in quantizers(twin):
        quantizer.observe()
    assert not warned(twin, images)  # there is no range yet
    for quantizer in quantizers(twin):
        if quantizer.weight_shape is None:
            quantizer.set_range_from_histogram()
    assert len(warned(twin, images)) == 1


def test_computing_in_float_on_purpose_says_nothing(quantized, images):
    uncalibrated = quantize(small_swin(), named_recipe("full"))
    disable(uncalibrated)
    disable(quantized, quiet=True)
    assert not warned(uncalibrated, images) and not warned(quantized, images)
    assert not warned(copy.deepcopy(quantized), images)


def test_nothing_is_said_while_a_model_is_compiled_or_exported(quantized, images):
    disable(quantized)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this model is calibrated")
        torch.export.export(quantized.eval(), (images,))
    assert len(warned(quantized, images)) == 1


@pytest.mark.parametrize("learned", [False, True])
def test_quantizers_compile_without_a_graph_break(learned):
    quantizer = calibrated(QuantSpec(grid_of("int4")), torch.randn(100)).train()
    if learned:
        quantizer.learn_range()
    x = torch.randn(4, 8)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), quantizer(x))


def test_a_checkpoint_of_a_model_that_is_switched_off_quantizes(quantized, tmp_path):
    disable(quantized)
    recipe, settings = named_recipe("full"), {"name": V1, "num_classes": 5, **SMALL}
    description = Description(settings, "ptq", Preprocessing(size=(32, 32)), recipe=recipe)
    save_checkpoint(tmp_path / "a.safetensors", quantized, description)
    loaded, _ = load_checkpoint(tmp_path / "a.safetensors")
    assert modes(loaded) == {Mode.QUANTIZING} and not [key for key in loaded.state_dict() if key.endswith("_off")]


def test_unsigned_levels_are_refused_where_values_are_negative():
    quantizer = TensorQuantizer(QuantSpec(UINT8), "fc2")
    quantizer.observe()
    quantizer(torch.rand(10))
    with pytest.raises(ValueError, match="fc2: it has negative values, which uint8 lacks; choose int8 or fp8"):
        quantizer(torch.tensor([0.5, -0.1]))
