"""Each kernel, in Triton's interpreter or on a GPU, against its reference in plain torch on random shapes."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and not interpreted"
)

from qswin.qat.kernels import attention, layer_norm, linear, norm_add, norm_quantize, patch_embed, pool_quantize  # noqa: E402
from qswin.qat.kernels.arithmetic import gelu  # noqa: E402

FORMATS = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])


def random_levels(dtype, *shape):
    """Of all magnitudes that the format has."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return (torch.randn(shape) * 2.0 ** torch.randint(-7, 7, shape)).clamp(-448, 448).to(dtype)


def random_int8(*shape):
    return random_levels(torch.int8, *shape)


def unit(dtype):
    """What makes sums of products of random levels, for a K of about 100, a few times the format's step."""
    return 1e-3 if dtype == torch.int8 else 2e-3


def order(levels):
    """Which level of its format each is, counted from the lowest, so that neighbours are 1 apart."""
    if levels.dtype == torch.int8:
        return levels.int()
    codes = levels.view(torch.uint8).int()
    return torch.where(codes < 128, codes, 128 - codes)


def compare(operator, reference, *arguments):
    """The kernel's result beside its reference's."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    return operator._init_fn(*moved).cpu(), reference(*arguments)


def assert_levels_close(ours, expected, share=0.002):
    """Equal but for few ties that the order of float sums decides, by one level."""
    assert ours.dtype == expected.dtype
    if CUDA and ours.dtype == torch.float8_e4m3fn:  # a GPU adds FP8 products with about 14 bits
        largest = float(expected.float().abs().max())
        torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-2, atol=2**-6 * largest)
        assert (ours.float() - expected.float()).abs().mean() < 2**-6 * expected.float().abs().mean()
        return
    difference = (order(ours) - order(expected)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize(("rows", "channels", "parts"), [(49, 96, 1), (5, 20, 1), (7, 24, 4), (3, 192, 4)])
@pytest.mark.parametrize("padded", [False, True])
@FORMATS
def test_norm_quantize(rows, channels, parts, padded, dtype):
    x = torch.randn(2, rows * parts, channels) * 3 + 1
    token_ids = torch.randperm(rows * parts).int().view(rows, parts)
    if padded:
        token_ids[1, 0] = -1
    weight, bias = torch.randn(parts * channels), torch.randn(parts * channels)
    arguments = (x, token_ids, weight, bias, 1e-5, 40.0, dtype)
    ours, expected = compare(norm_quantize.norm_quantize, norm_quantize.norm_quantize_reference, *arguments)
    assert ours.shape == (2 * rows, parts * channels)
    assert_levels_close(ours, expected)
    if padded and parts == 1:
        assert not ours[1].float().any() and not ours[rows + 1].float().any()


@pytest.mark.parametrize("parts", [1, 4])
@FORMATS
def test_gather_quantize(parts, dtype):
    x, token_ids = torch.randn(2, 7 * parts, 20), torch.randperm(7 * parts).int().view(7, parts)
    token_ids[2, 0] = -1
    inv_scale = torch.rand(parts * 20) * 80
    arguments = (x, token_ids, inv_scale, dtype)
    ours, expected = compare(norm_quantize.gather_quantize, norm_quantize.gather_quantize_reference, *arguments)
    assert torch.equal(ours.float(), expected.float())
    row = torch.cat([x[1, token] if token >= 0 else torch.zeros(20) for token in token_ids[2]])
    row = row * inv_scale
    levels = row.clamp(-128, 127).round() if dtype == torch.int8 else row.clamp(-448, 448)
    assert torch.equal(expected.view(2, 7, -1)[1, 2].float(), levels.to(dtype).float())


@pytest.mark.parametrize("padded", [False, True])
def test_norm_add(padded):
    token_ids = torch.randperm(37).int()
    if padded:
        token_ids = torch.cat([token_ids[:5], torch.tensor([-1], dtype=torch.int32), token_ids[5:]])
    y, shortcut = torch.randn(2 * len(token_ids), 24) * 3 + 1, torch.randn(2, 37, 24)
    weight, bias = torch.randn(24), torch.randn(24)
    arguments = (y, shortcut, token_ids, weight, bias, 1e-5)
    ours, expected = compare(norm_add.norm_add, norm_add.norm_add_reference, *arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    row = y.view(2, len(token_ids), -1)[1, (token_ids == 5).nonzero().item()].double()
    one = shortcut[1, 5] + torch.nn.functional.layer_norm(row, (24,), weight.double(), bias.double())
    torch.testing.assert_close(expected[1, 5].double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm(dtype):
    x = (torch.randn(2, 5, 7, 24) * 3 + 1).to(dtype)
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    ours, expected = compare(layer_norm.norm, layer_norm.norm_reference, x, weight, bias, 1e-5)
    assert ours.dtype == dtype and ours.shape == x.shape
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    exact = torch.nn.functional.layer_norm(x.double(), (24,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(expected.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "channels"), [(49, 200), (1, 128), (16, 20)])
@FORMATS
def test_pool_quantize(tokens, channels, dtype):
    x, inv_scale = (torch.randn(3, tokens, channels) + 0.5).half(), torch.rand(channels) * 150
    arguments = (x, inv_scale, dtype)
    ours, expected = compare(pool_quantize.pool_quantize, pool_quantize.pool_quantize_reference, *arguments)
    assert ours.shape == (3, channels)
    assert_levels_close(ours, expected, share=0.01)
    mean = x[1].double().mean(dim=0) * inv_scale
    step = 0.5001 if dtype == torch.int8 else 2.0**-4 * mean.abs() + 2.0**-9
    limit = 127 if dtype == torch.int8 else 448
    assert ((expected[1].double() - mean.clamp(-limit, limit)).abs() <= step).all()


@pytest.mark.parametrize(("side", "channels"), [(4, 96), (2, 16)])
@FORMATS
def test_patch_embed(side, channels, dtype):
    image, weight = torch.randn(2, 3, 8 * side, 9 * side), random_levels(dtype, channels, 3, side, side)
    scale, bias, norm = torch.rand(channels) * 1e-4, torch.randn(channels), torch.randn(2, channels)
    arguments = (image, weight, scale, bias, norm[0], norm[1], 40.0, 1e-5, torch.float32)
    ours, expected = compare(patch_embed.patch_embed, patch_embed.patch_embed_reference, *arguments)
    assert ours.shape == (2, 72, channels)
    tolerance = 1e-2 if CUDA and dtype == torch.float8_e4m3fn else 1e-4  # a GPU adds FP8 products with about 14 bits
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_norm_quantize_is_layer_norm():
    x, weight, bias = torch.randn(1, 10, 32), torch.randn(32), torch.randn(32)
    q_out = norm_quantize.norm_quantize_reference(
        x, torch.arange(10).int()[:, None], weight, bias, 1e-5, 30.0, torch.int8
    )
    expected = torch.nn.functional.layer_norm(x.double(), (32,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(
        q_out.double() / 30, expected[0].clamp(-128 / 30, 127 / 30), rtol=0, atol=0.5 / 30 + 1e-6
    )


SIZES = pytest.mark.parametrize(("m", "n", "k"), [(100, 96, 96), (64, 32, 200), (130, 160, 64), (1, 64, 33)])


@SIZES
@FORMATS
def test_linear_quantize(m, n, k, dtype):
    x, weight = random_levels(dtype, m, k), random_levels(dtype, n, k)
    scale, bias = torch.rand(n) * unit(dtype), torch.randn(n) * 20
    ours, expected = compare(linear.linear_quantize, linear.linear_quantize_reference, x, weight, scale, bias)
    assert_levels_close(ours, expected)


@SIZES
@FORMATS
def test_linear_gelu_quantize(m, n, k, dtype):
    x, weight = random_levels(dtype, m, k), random_levels(dtype, n, k)
    scale, bias = torch.rand(n) * unit(dtype) / 10, torch.randn(n)
    inv_scale = torch.rand(n) * 60  # each channel's own
    arguments = (x, weight, scale, bias, inv_scale)
    ours, expected = compare(linear.linear_gelu_quantize, linear.linear_gelu_quantize_reference, *arguments)
    if dtype == torch.int8:
        assert_levels_close(ours, expected, share=0.02)
    else:  # a step of the format, and GELU's error
        torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-3, atol=0.03)
    column = torch.nn.functional.gelu((x.double() @ weight[-1].double()) * scale[-1] + bias[-1]) * inv_scale[-1]
    if dtype == torch.int8:
        assert (expected[:, -1].double() - column.clamp(-128, 127)).abs().max() <= 0.5001
    else:  # half a step: 2**-4 of the value, or 2**-10
        torch.testing.assert_close(expected[:, -1].double(), column.clamp(-448, 448), rtol=2**-4, atol=2**-9)


@pytest.mark.parametrize(("m", "n", "k"), [(150, 96, 96), (70, 160, 33), (130, 128, 200)])
@FORMATS
def test_walks_over_the_columns_compute_the_same(m, n, k, dtype, monkeypatch):
    """What layers with many rows do; here with as few as can be."""
    monkeypatch.setattr(linear, "MULTIPROCESSORS", 0)
    assert linear.walk_config(m, n, k) is not None and linear.walk_config(m, n, 300) is None
    x, weight = random_levels(dtype, m, k), random_levels(dtype, n, k)
    scale, bias, inv_scale = torch.rand(n) * unit(dtype), torch.randn(n) * 20, torch.rand(n) * 5
    ours, expected = compare(linear.linear_quantize, linear.linear_quantize_reference, x, weight, scale, bias)
    assert_levels_close(ours, expected)
    arguments = (x, weight, scale / 20, bias / 20, inv_scale)
    ours, expected = compare(linear.linear_gelu_quantize, linear.linear_gelu_quantize_reference, *arguments)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-3, atol=1.0 if dtype == torch.int8 else 0.03)
    ours, expected = compare(linear.linear_float, linear.linear_float_reference, x, weight, scale, bias, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=1e-2 if CUDA else 1e-5, atol=1e-2 if CUDA else 1e-5)


def test_a_walk_normalizes_heads(monkeypatch):
    monkeypatch.setattr(linear, "MULTIPROCESSORS", 0)
    x, weight = random_int8(150, 64), random_int8(288, 64)
    arguments = (x, weight, torch.rand(288) * 1e-3, torch.randn(288), torch.full((288,), 100.0), 32)
    ours, expected = compare(linear.linear_cosine_quantize, linear.linear_cosine_quantize_reference, *arguments)
    assert_levels_close(ours, expected, share=0.01)


@triton.jit
def _gelu_kernel(y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, gelu(tl.load(y_ptr + offsets), 2.0))


@pytest.mark.filterwarnings("ignore:overflow")
def test_gelu():
    """Within 3e-4 + 2.5e-4 * |y| of the definition, in float64, and right far outside the range it was fitted on."""
    y = torch.cat([torch.linspace(-8, 8, 4094), torch.tensor([-1e4, 1e4])]).to(DEVICE)
    found = torch.empty_like(y)
    _gelu_kernel[(1,)](y, found, BLOCK=4096)
    expected = torch.nn.functional.gelu(y.double())
    assert ((found / 2 - expected).abs() <= 3e-4 + (2.5e-4 * y.abs() if CUDA else 0)).all()


def test_integer_sums_are_exact():
    """With scales of 1 and no bias the result is the integer sum, to the bit, saturated."""
    x, weight = torch.randint(-5, 6, (70, 40), dtype=torch.int8), torch.randint(-3, 4, (32, 40), dtype=torch.int8)
    one, zero = torch.ones(32), torch.zeros(32)
    ours, expected = compare(linear.linear_quantize, linear.linear_quantize_reference, x, weight, one, zero)
    assert torch.equal(ours, expected)
    sums = x.int() @ weight.int().T
    assert torch.equal(ours, sums.clamp(-128, 127).to(torch.int8)) and sums.abs().max() > 128


def test_ties_go_to_even():
    """x is the identity times 2, so that half of the weight's levels come out."""
    weight, half = (
        torch.arange(-16, 16, dtype=torch.int8).view(1, 32).expand(32, 32).contiguous(),
        torch.full((32,), 0.25),
    )
    x = 2 * torch.eye(32, dtype=torch.int8)
    ours, expected = compare(linear.linear_quantize, linear.linear_quantize_reference, x, weight, half, torch.zeros(32))
    assert torch.equal(ours, expected)
    assert ours[:, 0].tolist() == [round(level / 2) for level in range(-16, 16)]  # Python rounds ties to even


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("levels", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_linear_float(dtype, levels):
    x, weight = random_levels(levels, 70, 384), random_levels(levels, 96, 384)
    scale, bias = torch.rand(96) * 1e-4, torch.randn(96)
    ours, expected = compare(linear.linear_float, linear.linear_float_reference, x, weight, scale, bias, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(expected.double(), (x.double() @ weight.double().T) * scale + bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@FORMATS
def test_linear_add(padded, dtype):
    batch, rows, n, k = 2, 37, 64, 96
    x, weight = random_levels(dtype, batch * rows, k), random_levels(dtype, n, k)
    scale, bias = torch.rand(n) * 1e-4, torch.randn(n)
    token_ids = torch.randperm(rows).int()
    if padded:
        token_ids = torch.cat([token_ids[:20], torch.tensor([-1], dtype=torch.int32), token_ids[20:]])
        x = random_levels(dtype, batch * (rows + 1), k)
    shortcut = torch.randn(batch, rows, n)
    ours, expected = compare(
        linear.linear_add, linear.linear_add_reference, x, weight, scale, bias, shortcut, token_ids
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    image = x.view(batch, -1, k)[1, (token_ids == 5).nonzero().item()]
    one = shortcut[1, 5].double() + (image.double() @ weight.double().T) * scale.double() + bias.double()
    torch.testing.assert_close(expected[1, 5].double(), one, rtol=1e-5, atol=1e-5)


# The format, whether probabilities have levels of 0 to 255, and the level of probability 1.
PROBABILITIES = pytest.mark.parametrize(
    ("dtype", "unsigned", "top"),
    [(torch.int8, False, 127.0), (torch.int8, True, 255.0), (torch.float8_e4m3fn, False, 448.0)],
    ids=["int8", "uint8", "fp8"],
)


@pytest.mark.parametrize(
    ("windows", "masks", "heads", "tokens"),
    [(9, 1, 3, 49), (4, 2, 2, 49), (3, 3, 1, 16), (1, 1, 2, 64), (2, 2, 2, 144), (2, 1, 1, 197), (1, 1, 2, 256)]
    + ([(2, 2, 2, 576), (1, 1, 3, 1025)] if CUDA else []),
)
@PROBABILITIES
def test_window_attention(windows, masks, heads, tokens, dtype, unsigned, top):
    qkv, bias = random_levels(dtype, windows * tokens, 3 * heads * 32), torch.randn(masks, heads, tokens, tokens)
    if masks > 1:
        bias[1, :, : tokens // 2, tokens // 2 :] = -100.0
    scales = (torch.rand(heads) * 3e-4, top, 0.9 / top)
    arguments = (qkv, attention.padded_bias(bias), tokens, *scales, unsigned)
    ours, expected = compare(attention.window_attention, attention.window_attention_reference, *arguments)
    assert ours.shape == (windows * tokens, heads * 32)
    assert_levels_close(ours, expected, share=0.01 if dtype == torch.int8 else 0.02)


@pytest.mark.parametrize("tokens", [50, 197])
@PROBABILITIES
def test_attention_may_have_no_bias(tokens, dtype, unsigned, top):
    qkv = random_levels(dtype, 2 * tokens, 3 * 2 * 64)
    scales = (torch.rand(2) * 3e-4, top, 0.9 / top)
    ours, expected = compare(
        attention.window_attention, attention.window_attention_reference, qkv, None, tokens, *scales, unsigned
    )
    assert_levels_close(ours, expected, share=0.01 if dtype == torch.int8 else 0.02)
    zeros = attention.padded_bias(torch.zeros(1, 2, tokens, tokens))
    with_zeros = attention.window_attention_reference(qkv, zeros, tokens, *scales, unsigned)
    assert torch.equal(with_zeros.float(), expected.float())


def test_the_tiles_hold_a_window():
    for tokens in range(1, attention.MAX_TOKENS + 1):
        tiles = attention.tiles(tokens)
        assert tokens <= tiles.all_keys < 2 * max(tokens, 17)
        assert tiles.queries * tiles.all_keys <= 160 * 128  # registers of 128 threads
    assert attention.tiles(144) == (64, 128, 32) and attention.tiles(576) == (16, 512, 64)


def test_window_attention_is_attention():
    """It is torch's attention of the dequantized tensors, but for the rounding of probabilities and results."""
    qkv, bias = random_int8(2 * 49, 3 * 2 * 32), torch.randn(1, 2, 49, 49)
    q, k, v = (qkv.float() / 127).view(2, 49, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q_out = attention.window_attention_reference(
        qkv, attention.padded_bias(bias), 49, torch.full((2,), 32**-0.5 / 127**2), 127.0, 1 / 127.0, False
    )
    found = q_out.float().view(2, 49, 2, 32).transpose(1, 2) / 127
    bound = v.abs().sum(dim=-2, keepdim=True) / 254 + 0.5 / 127 + 1e-5  # of rounding each probability, and the result
    assert ((found - expected).abs() <= bound).all()
    assert (found - expected).abs().mean() < 0.01


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (3, 32), (1, 64)])
@FORMATS
def test_linear_cosine_quantize(heads, head_dim, dtype):
    channels = heads * head_dim
    x, weight = random_levels(dtype, 70, 64), random_levels(dtype, 3 * channels, 64)
    scale, bias = torch.rand(3 * channels) * unit(dtype), torch.randn(3 * channels)
    inv_scale = torch.tensor([250.0, 200.0, 12.0]).repeat_interleave(channels)
    arguments = (x, weight, scale, bias, inv_scale, head_dim)
    ours, expected = compare(linear.linear_cosine_quantize, linear.linear_cosine_quantize_reference, *arguments)
    assert ours.shape == (70, 3 * channels)
    assert_levels_close(ours, expected, share=0.01)
    y = ((x.double() @ weight.double().T) * scale + bias).view(70, 3, heads, head_dim)[8]
    head = torch.cat([y[0, -1] / y[0, -1].norm() * 250, y[1, 0] / y[1, 0].norm() * 200, y[2, 0] * 12])
    found = expected.view(70, 3, heads, head_dim)[8].double()
    found = torch.cat([found[0, -1], found[1, 0], found[2, 0]])
    if dtype == torch.int8:
        assert (found - head.clamp(-128, 127)).abs().max() <= 0.5001
    else:
        torch.testing.assert_close(found, head.clamp(-448, 448), rtol=2**-4, atol=2**-9)


def test_heads_without_a_direction_stay_zero():
    weight, one = torch.zeros(96, 32, dtype=torch.int8), torch.ones(96)
    ours, expected = compare(
        linear.linear_cosine_quantize,
        linear.linear_cosine_quantize_reference,
        *(random_int8(4, 32), weight, one, torch.zeros(96), 100 * one, 32),
    )
    assert not ours.any() and not expected.any()
