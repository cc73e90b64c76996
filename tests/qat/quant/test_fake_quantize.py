"""Fake quantization against float64 NumPy, finite arithmetic against LSQ's published formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qswin.calib.grid import FP8, INT8, Grid, IntegerGrid, grid_of
from qswin.qat.quant.fake_quantize import fake_quantize, scale_gradient

values = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-100, 100, width=32))
scales = st.floats(2**-10, 2.0, width=32)


@given(values, scales, st.integers(2, 8))
@settings(max_examples=200)
def test_values_are_numpys_in_float64(x, scale, bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    got = fake_quantize(torch.from_numpy(x), torch.tensor(scale), grid_of(f"int{bits}")).numpy()
    levels = x.astype(np.float64) / scale
    tie = np.abs(levels - np.floor(levels) - 0.5) < 1e-4  # float32 division may fall on either side of a tie
    expected = np.clip(np.rint(levels), qmin, qmax) * scale
    np.testing.assert_allclose(got[~tie], expected[~tie], rtol=1e-6)
    assert (np.abs(got[tie] - expected[tie]) <= scale * 1.001).all()


@given(values, scales)
@settings(max_examples=50)
def test_quantizing_twice_changes_nothing(x, scale):
    once = fake_quantize(torch.from_numpy(x), torch.tensor(scale), INT8)
    assert torch.equal(fake_quantize(once, torch.tensor(scale), INT8), once)


def test_ties_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert fake_quantize(x, torch.tensor(1.0), INT8).tolist() == [-2, -2, 0, 0, 2, 2]


def test_each_channel_has_its_scale():
    x, scale = torch.randn(3, 4), torch.tensor([[0.1], [0.01], [1.0]])
    rows = [fake_quantize(row, s, INT8.of_weights) for row, s in zip(x, scale, strict=True)]
    assert torch.equal(fake_quantize(x, scale, INT8.of_weights), torch.stack(rows))


def lsq_reference(
    x: np.ndarray, scale: np.ndarray, grad: np.ndarray, qmin: int, qmax: int
) -> tuple[np.ndarray, np.ndarray]:
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
    fake_quantize(x_torch, scale_torch, IntegerGrid("some", 8, *limits)).backward(torch.from_numpy(grad))
    of_x, of_scale = lsq_reference(x, scale, grad, *limits)
    np.testing.assert_allclose(x_torch.grad, of_x, rtol=1e-6)
    expected = of_scale.sum() if shape == () else of_scale.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scale_torch.grad, expected, rtol=1e-4, atol=1e-4)


def test_without_a_learned_scale_the_gradient_of_x_is_the_same():
    x = torch.randn(100)
    with_scale, without = (x.clone().requires_grad_() for _ in range(2))
    fake_quantize(with_scale, torch.tensor(0.01, requires_grad=True), INT8).sum().backward()
    fake_quantize(without, torch.tensor(0.01), INT8).sum().backward()
    assert torch.equal(with_scale.grad, without.grad) and 0 < without.grad.sum() < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    x = torch.randn(10, dtype=dtype, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.05), INT8)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype


def first_formula(x, scale, qmin, qmax, grad):
    """The value and gradients of x and of the scale, as they were computed before there were grids."""
    levels = torch.div(x.float(), scale)
    rounded = levels.round()
    clipped = rounded.clamp(qmin, qmax)
    inside = rounded == clipped
    of_scale = (grad * torch.where(inside, rounded - levels, clipped)).sum_to_size(scale.shape)
    return clipped.mul(scale).to(x.dtype), torch.where(inside, grad, 0.0), of_scale


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(), (8, 1)])
@pytest.mark.parametrize("grid", [INT8, INT8.of_weights, grid_of("int4"), grid_of("int2").of_weights], ids=repr)
def test_values_and_gradients_are_the_first_formulas_bit_for_bit(grid, shape, learned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 200, generator=generator).requires_grad_()
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.005).requires_grad_(learned)
    grad = torch.randn(8, 200, generator=generator)
    value = fake_quantize(x, scale, grid)
    value.backward(grad)
    expected = first_formula(x.detach(), scale.detach(), grid.qmin, grid.qmax, grad)
    found = (value.detach(), x.grad, scale.grad) if learned else (value.detach(), x.grad)
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("learned", "saved"), [(True, 4 * 1600), (False, 1600)])
def test_what_is_kept_for_the_gradient_is_one_tensor(learned, saved):
    """The levels as float32 where the scale learns, else a mask of a byte a value."""
    sizes = []
    x, scale = torch.randn(8, 200, requires_grad=True), torch.tensor(0.01, requires_grad=learned)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.nbytes) or kept, lambda kept: kept):
        fake_quantize(x, scale, INT8)
    assert sizes == [saved]


class Powers(Grid):
    """Signed powers of two: a format that is not one of integers."""

    def round(self, x):
        return x.sign() * x.abs().clamp(min=2.0**-20).log2().round().exp2()


@pytest.mark.parametrize("learned", [False, True])
def test_another_format_has_the_same_gradients(learned):
    powers = Powers("powers", 4, -8.0, 8.0)
    x = torch.tensor([0.9, -3.2, 7.0, 20.0, -30.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=learned)
    y = fake_quantize(x, scale, powers)
    y.sum().backward()
    assert y.tolist() == [1.0, -4.0, 8.0, 8.0, -8.0] and x.grad.tolist() == [1, 1, 1, 0, 0]
    if learned:
        assert scale.grad.item() == pytest.approx(0.1 - 0.8 + 1.0 + 8 - 8)


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
        (quantized(x, scale, INT8) * torch.arange(16.0)).sum().backward()
        return [x.grad, scale.grad] if learned else [x.grad]

    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    for found, expected in zip(step(compiled), step(fake_quantize), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().sum() > 0


def test_an_exported_program_computes_the_same():
    class Rounded(torch.nn.Module):
        def forward(self, x):
            return fake_quantize(x, torch.tensor(0.1), grid_of("int4"))

    x = torch.randn(3, 20)
    program = torch.export.export(Rounded(), (x,))
    assert torch.equal(program.module()(x), Rounded()(x))


def test_fp8_is_torchs_cast():
    x = torch.cat([torch.randn(1000) * 2.0**power for power in range(-12, 12)])
    scale = torch.tensor(0.25)
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(fake_quantize(x, scale, FP8), expected)


def test_fp8s_gradients_pass_within_its_range_and_reach_the_scale():
    """By LSQ's formula: level minus value inside, the largest level outside; 464 still rounds to 448."""
    x = torch.tensor([1.1, -300.0, 463.0, 465.0, -1e4], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, FP8).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0]
    levels = [1.125 - 1.1, -288.0 + 300.0, 448.0 - 463.0, 448.0, -448.0]
    assert scale.grad.item() == pytest.approx(sum(levels), rel=1e-4)
