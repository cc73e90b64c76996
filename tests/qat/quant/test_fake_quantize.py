"""Fake quantization against float64 NumPy, finite arithmetic against LSQ's published formulas."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qswin.qat.quant.fake_quantize import fake_quantize, least_squares_amax, scale_gradient

values = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-100, 100, width=32))
scales = st.floats(2**-10, 2.0, width=32)


@given(values, scales, st.integers(2, 8))
@settings(max_examples=200)
def test_values_are_numpys_in_float64(x, scale, bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    got = fake_quantize(torch.from_numpy(x), torch.tensor(scale), qmin, qmax).numpy()
    levels = x.astype(np.float64) / scale
    tie = np.abs(levels - np.floor(levels) - 0.5) < 1e-4  # float32 division may fall on either side of a tie
    expected = np.clip(np.rint(levels), qmin, qmax) * scale
    np.testing.assert_allclose(got[~tie], expected[~tie], rtol=1e-6)
    assert (np.abs(got[tie] - expected[tie]) <= scale * 1.001).all()


@given(hnp.arrays(np.float32, (3, 20), elements=st.floats(-9, 9, width=32, allow_subnormal=False)), st.integers(2, 8))
@example(np.full((3, 20), 1e-30, np.float32), 2)  # the squares are below float32's smallest number
@settings(max_examples=30)
def test_least_squares_ranges_are_no_worse_than_any_candidate(x, bits):
    """Errors counted in float64, for each channel on its own; the largest range is among the candidates."""
    qmax = 2 ** (bits - 1) - 1
    largest = np.abs(x).max(axis=1, keepdims=True)
    best = least_squares_amax(torch.from_numpy(x), torch.from_numpy(largest), -qmax, qmax, candidates=8).numpy()

    def error(channel: int, amax: float) -> float:
        scale = np.float64(amax) / qmax
        if scale == 0:
            return float((x[channel].astype(np.float64) ** 2).sum())
        return float(((np.clip(np.rint(x[channel] / scale), -qmax, qmax) * scale - x[channel]) ** 2).sum())

    assert best.shape == (3, 1) and (best <= largest).all()
    for channel in range(3):
        errors = [error(channel, share * largest[channel, 0]) for share in np.linspace(0.25, 1, 8)]
        assert error(channel, best[channel, 0]) <= min(errors) * 1.001 + 1e-6 * float(largest[channel, 0]) ** 2


@given(values, scales)
@settings(max_examples=50)
def test_quantizing_twice_changes_nothing(x, scale):
    once = fake_quantize(torch.from_numpy(x), torch.tensor(scale), -128, 127)
    assert torch.equal(fake_quantize(once, torch.tensor(scale), -128, 127), once)


def test_ties_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert fake_quantize(x, torch.tensor(1.0), -128, 127).tolist() == [-2, -2, 0, 0, 2, 2]


def test_each_channel_has_its_scale():
    x, scale = torch.randn(3, 4), torch.tensor([[0.1], [0.01], [1.0]])
    rows = [fake_quantize(row, s, -127, 127) for row, s in zip(x, scale, strict=True)]
    assert torch.equal(fake_quantize(x, scale, -127, 127), torch.stack(rows))


def lsq_reference(x: np.ndarray, scale: np.ndarray, grad: np.ndarray, qmin: int, qmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Equations 3 and 5 of "Learned Step Size Quantization", in float64."""
    v = x.astype(np.float64) / scale
    inside = (np.rint(v) >= qmin) & (np.rint(v) <= qmax)
    of_scale = np.where(inside, np.rint(v) - v, np.clip(v, qmin, qmax))
    return grad * inside, grad * of_scale


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("limits", [(-128, 127), (-7, 7), (-2, 1)])
def test_gradients_are_lsqs(shape, limits):
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(6, 50)).astype(np.float32), rng.normal(size=(6, 50)).astype(np.float32)
    scale = rng.uniform(0.01, 0.3, shape).astype(np.float32)
    x_torch, scale_torch = torch.tensor(x, requires_grad=True), torch.tensor(scale, requires_grad=True)
    fake_quantize(x_torch, scale_torch, *limits).backward(torch.from_numpy(grad))
    of_x, of_scale = lsq_reference(x, scale, grad, *limits)
    np.testing.assert_allclose(x_torch.grad, of_x, rtol=1e-6)
    expected = of_scale.sum() if shape == () else of_scale.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scale_torch.grad, expected, rtol=1e-4, atol=1e-4)


def test_without_a_learned_scale_the_gradient_of_x_is_the_same():
    x = torch.randn(100)
    with_scale, without = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(with_scale, torch.tensor(0.01, requires_grad=True), -128, 127).sum().backward()
    fake_quantize(without, torch.tensor(0.01), -128, 127).sum().backward()
    assert torch.equal(with_scale.grad, without.grad) and 0 < without.grad.sum() < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    x = torch.randn(10, dtype=dtype, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.05), -128, 127)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype


def test_scale_gradient_changes_the_gradient_only():
    x = torch.tensor(3.0, requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward()
    assert (y.item(), x.grad.item()) == (3.0, 0.25)


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_under_torch_compile_are_the_same(learned):
    def step(quantized) -> list[torch.Tensor]:
        x = torch.linspace(-3, 3, 64).view(4, 16).requires_grad_()
        scale = torch.full((4, 1), 0.02).requires_grad_(learned)
        (quantized(x, scale, -128, 127) * torch.arange(16.0)).sum().backward()
        return [x.grad, scale.grad] if learned else [x.grad]

    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    for found, expected in zip(step(compiled), step(fake_quantize), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().sum() > 0
