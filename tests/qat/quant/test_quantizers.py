"""TensorQuantizer: states, ranges, what it refuses."""

import numpy as np
import pytest
import torch

from qswin.calib.calibrators import Histogram, find_range
from qswin.qat.quant.quantizers import Mode, QuantSpec, TensorQuantizer, quantizers, table


def calibrated(spec: QuantSpec, x: torch.Tensor) -> TensorQuantizer:
    quantizer = TensorQuantizer(spec, "block.fc1")
    quantizer.observe()
    quantizer(x)
    quantizer.set_range_from_histogram()
    quantizer.quantize()
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
    quantizer = TensorQuantizer(QuantSpec(bits, amax=1.0))
    quantizer.quantize()
    qmax = 2 ** (bits - 1) - 1
    levels = quantizer(x).unique() * qmax
    torch.testing.assert_close(levels, torch.arange(-qmax - 1, qmax + 1.0))


def test_weights_leave_out_the_lowest_level():
    quantizer = TensorQuantizer(QuantSpec(4, narrow=True, amax=1.0))
    quantizer.quantize()
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
    quantizer = TensorQuantizer(QuantSpec(axis=0, narrow=True), weight_shape=weight.shape)
    quantizer.set_range_from_weight(weight)
    assert quantizer._amax.shape == (6, 1, 1, 1)
    assert quantizer._amax.flatten().tolist() == [channel.abs().max().item() for channel in weight]


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "never calibrated"), (0.0, "dead"), (float("inf"), "infinite"), (-1.0, "dead")]
)
def test_a_range_that_is_none_never_quantizes(value, words):
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer._amax.fill_(value)
    with pytest.raises(ValueError, match=rf"layers\.0\.fc1.*{words}"):
        quantizer.quantize()
    assert quantizer.mode is Mode.OFF


def test_values_that_are_not_finite_name_the_site():
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer.observe()
    with pytest.raises(ValueError, match=r"layers\.0\.fc1.*nan"):
        quantizer(torch.tensor([1.0, float("nan")]))


def test_a_site_that_was_never_reached_is_an_error():
    quantizer = TensorQuantizer(QuantSpec(), "layers.0.fc1")
    quantizer.observe()
    with pytest.raises(ValueError, match="nothing was observed"):
        quantizer.set_range_from_histogram()


@pytest.mark.parametrize("settings", [{"bits": 1}, {"bits": 9}, {"amax": 0.0}, {"amax": -1.0}, {"calibrator": "none"}])
def test_specs_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError):
        QuantSpec(**settings)


def test_a_learned_range_starts_where_it_was_and_stays_positive():
    x = torch.randn(1000)
    quantizer = calibrated(QuantSpec(4, calibrator="max"), x).train()
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
    quantizer = calibrated(QuantSpec(4, calibrator="max"), x).train()
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


def test_the_table_lists_every_quantizer(quantized):
    lines = table(quantized).splitlines()
    assert len(lines) == 1 + len(list(quantizers(quantized)))
    assert any(line.split() == ["layers.0.blocks.0.attn.probs", "8", "1", "quantizing"] for line in lines)
