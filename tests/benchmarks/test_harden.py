"""A hardened model computes the same and is harder to quantize."""

import sys

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harden import harden, main
from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model
from qswin.qat.ptq.ranges import find_ranges
from qswin.qat.quant.recipe import named_recipe
from qswin.qat.quant.rewrite import quantize
from tests.helpers import V1, V2, VARIANTS, lively_swin, small_swin

# {model: (how it is built, norms whose outputs have large channels)}
MODELS = {
    "swin v1": (
        lively_swin,
        ("layers.0.blocks.0.norm1", "layers.1.blocks.1.norm2", "layers.1.downsample.norm", "norm"),
    ),
    "swin v2": (lambda: small_swin(V2), ("patch_embed.norm", "layers.0.blocks.1.norm2", "norm")),
    "vit": (VARIANTS["vit, class token"].build, ("blocks.0.norm1", "blocks.1.norm2", "norm")),
    "vit, average": (VARIANTS["vit, average pooling"].build, ("blocks.0.norm1", "fc_norm")),
}


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    twin = quantize(model, named_recipe("gemm"))
    find_ranges(twin, [images])
    return twin


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL of the answers, in float64: of small models it is small."""
    log_p, log_q = (values.double().log_softmax(1) for values in (expected, found))
    return float(nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))


def channel_ranges(model: nn.Module, norm: str, images: Tensor) -> Tensor:
    """The largest |value| of each channel of a norm's output."""
    found: list[Tensor] = []
    handle = model.get_submodule(norm).register_forward_hook(lambda _, args, output: found.append(output))
    logits(model, images)
    handle.remove()
    return found[0].abs().flatten(0, -2).amax(0)


@pytest.mark.parametrize("name", MODELS)
def test_a_hardened_model_computes_the_same_and_quantizes_worse(name, images):
    build, norms = MODELS[name]
    model = build()
    twin = harden(model, 100, seed=0)
    expected = logits(model, images)
    apart = (logits(twin, images) - expected).abs().max() / expected.abs().max()
    assert apart < 1e-4
    for norm in norms:
        ranges = channel_ranges(twin, norm, images)
        assert ranges.max() / ranges.median() > 10, norm
    plain, hard = (divergence(expected, logits(quantized(m, images), images)) for m in (model, twin))
    assert hard > 5 * plain


def test_the_stream_of_a_swin_v2_has_large_channels(images):
    """What the second block reads is the stream: there is no norm before it."""
    read: list[Tensor] = []
    twin = harden(small_swin(V2), 100, seed=0)
    twin.layers[0].blocks[1].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    logits(twin, images)
    ranges = read[0].abs().flatten(0, -2).amax(0)
    assert ranges.max() / ranges.median() > 10


def test_the_seed_chooses_the_channels_and_the_model_is_left_as_it_was():
    model = small_swin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, same, other = (harden(model, 100, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_models_that_cannot_be_hardened_are_refused():
    with pytest.raises(ValueError, match="Cvt has nothing to scale"):
        harden(VARIANTS["cvt"].build(), 100, seed=0)
    with pytest.raises(ValueError, match="largest=1 makes no channel larger"):
        harden(small_swin(), 1, seed=0)


def test_the_file_is_a_checkpoint_for_a_config(config_file, images, tmp_path, monkeypatch):
    out = tmp_path / "hard.safetensors"
    arguments = ["--model", V1, "--checkpoint", tmp_path / "weights.pth", "--out", out, "--config", config_file]
    monkeypatch.setattr(sys, "argv", ["harden", *map(str, arguments)])
    main()
    config = load_config(config_file, [f"model.checkpoint={out}"])
    model = build_float_model(config.model, config.data.preprocessing).model
    expected = logits(harden(small_swin(), 100, seed=0), images)
    torch.testing.assert_close(logits(model, images), expected)
