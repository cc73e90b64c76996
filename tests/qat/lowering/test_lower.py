"""The lowered model against the fake-quantized one, which rounds at the same places."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from qswin.qat.lowering.layers import Float32Interface, LoweredHead, LoweredPatchEmbed  # noqa: E402
from qswin.qat.lowering.lower import lower  # noqa: E402
from qswin.qat.lowering.swin import LoweredBlock, LoweredPatchMerging, window_token_ids  # noqa: E402
from qswin.qat.ptq.ranges import find_ranges  # noqa: E402
from qswin.qat.quant.recipe import Rule, named_recipe  # noqa: E402
from qswin.qat.quant.rewrite import quantize  # noqa: E402
from tests.helpers import V1, V2, VARIANTS, scale_channels, twin_of  # noqa: E402

SIZES = pytest.mark.parametrize("settings", [{}, {"img_size": 24, "window_size": 5}], ids=["even", "padded"])
SCALED = ("qkv", "fc1", "fc2", "reduction", "head.fc")  # layers whose inputs' channels may be scaled


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"img_size": 24, "window_size": 5}, {"img_size": 80, "window_size": 10}],
    ids=["even", "padded", "large"],
)
def test_the_lowered_model_computes_what_the_twin_does(name, settings):
    images = torch.randn(6, 3, settings.get("img_size", 32), settings.get("img_size", 32))
    twin = twin_of(images, name=name, **settings)
    assert_computes_the_same(lower(twin, images[:1]), twin, images, flips=0.02 if name == V2 else 0.01)


def unsigned_probabilities():
    attention = named_recipe("attention")
    rule = Rule("attn.probs", quantize=True, activation_format="uint8")
    return dataclasses.replace(attention, rules=(*attention.rules, rule))


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("recipe", ["attention-fp8", unsigned_probabilities()], ids=["fp8", "unsigned probabilities"])
def test_other_formats_are_computed_as_the_twin_does(name, recipe):
    images = torch.randn(6, 3, 32, 32)
    twin = twin_of(images, recipe, name=name)
    lowered = lower(twin, images[:1])
    assert_computes_the_same(lowered, twin, images, flips=0.05)
    block = next(module for module in lowered.modules() if isinstance(module, LoweredBlock))
    assert block.fc1.weight.dtype == (torch.float8_e4m3fn if recipe == "attention-fp8" else torch.int8)
    assert block.attention.unsigned == (recipe != "attention-fp8")


@pytest.mark.parametrize("name", [V1, V2])
@SIZES
def test_channel_scales_are_folded_into_norms_and_epilogues(name, settings):
    images = torch.randn(6, 3, settings.get("img_size", 32), settings.get("img_size", 32))
    twin = twin_of(images, name=name, **settings)
    before = {key: value.clone() for key, value in lower(twin, images[:1]).named_buffers()}
    assert len(scale_channels(twin, images, *SCALED)) == 4 * 3 + 2
    lowered = lower(twin, images[:1])
    assert_computes_the_same(lowered, twin, images, flips=0.03)
    changed = {key.rpartition(".")[2] for key, value in lowered.named_buffers() if not torch.equal(value, before[key])}
    assert "inv_scale" in changed
    assert {key: value.shape for key, value in lowered.named_buffers()} == {k: v.shape for k, v in before.items()}


def assert_computes_the_same(lowered, twin, images, flips=0.01):
    """Block by block on the twin's own inputs: rounding flips cannot add up. In the logits they may, to `flips`."""
    inputs = {}
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.inference_mode():
        expected, found = twin(images), lowered(images)
        kinds = LoweredBlock | LoweredPatchMerging | LoweredPatchEmbed | LoweredHead
        replaced = [name for name, module in lowered.named_modules() if isinstance(module, kinds)]
        assert len(replaced) == 7  # four blocks, a merging, the stem, the classifier
        for name in replaced:
            theirs, ours = (model.get_submodule(name)(inputs[name]) for model in (twin, lowered))
            difference = (ours - theirs).abs()
            assert difference.mean() < 1e-3 * theirs.abs().mean()  # ties only: most values are equal
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found - expected).abs().mean() < flips * expected.abs().mean()


@pytest.mark.parametrize("name", [V1, V2])
def test_the_residual_stream_may_be_half(images, name):
    twin = twin_of(images, name=name)
    lowered = lower(twin, images[:1], torch.bfloat16)
    with torch.inference_mode():
        expected, found = twin(images), lowered(images.bfloat16())
    assert next(lowered.parameters()).dtype == torch.bfloat16 and found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_interface_in_float32_leaves_the_scales_alone(images):
    lowered = lower(twin_of(images), images[:1], torch.float16)
    scales = {name: buffer.clone() for name, buffer in lowered.named_buffers() if name.endswith("scale")}
    wrapped = Float32Interface(lowered)
    with torch.inference_mode():
        assert torch.equal(wrapped(images), lowered(images.half()).float()) and wrapped(images).dtype == torch.float32
    assert len(scales) > 10
    for name, buffer in lowered.named_buffers():
        assert name not in scales or (buffer.dtype == torch.float32 and torch.equal(buffer, scales[name]))


def test_weights_are_stored_as_integers(images):
    lowered = lower(twin_of(images), images[:1])
    block = next(module for module in lowered.modules() if isinstance(module, LoweredBlock))
    assert block.fc1.weight.dtype == torch.int8 and block.fc1.weight.abs().max() == 127
    assert [name for name, _ in lowered.named_parameters()] == ["norm.weight", "norm.bias"]


def test_every_token_is_in_one_window(images):
    twin = twin_of(images)
    block = twin.layers[0].blocks[1]  # a shifted one
    token_ids = window_token_ids(block, 16, 16).flatten()
    assert token_ids.sort().values.tolist() == list(range(256))
    assert token_ids[0] == 2 * 16 + 2  # rolled by half a window of four


@pytest.mark.parametrize("site", ["attn.proj", "attn.qk", "attn.av", "patch_embed.proj"])
def test_channel_scales_that_a_kernel_lacks_are_refused_by_name(images, site):
    twin = twin_of(images)
    path = site if site.startswith("patch") else f"layers.0.blocks.1.{site}"
    named = path.replace("qk", "q").replace("av", "probs")
    twin.get_submodule(path)._input_quantizer._pre_quant_scale = torch.tensor(2.0)
    with pytest.raises(ValueError, match=f"^{re.escape(named)} scales its input's channels, .* fold them"):
        lower(twin, images[:1])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gemm", r"attn\.q is in float; .*recipe=attention"),
        ("full", r"add1 is quantized; .*recipe=attention"),
        (
            dataclasses.replace(named_recipe("attention"), weight_format="int4"),
            r"patch_embed\.weight is in int4; .* all sites in int8",
        ),
    ],
)
def test_sites_that_do_not_fit_are_named(images, recipe, message):
    with pytest.raises(ValueError, match=message):
        lower(twin_of(images, recipe), images[:1])


def test_other_models_are_refused(images):
    twin = quantize(VARIANTS["cvt"].build(), named_recipe("attention"))
    find_ranges(twin, [images])
    with pytest.raises(ValueError, match="no block that the kernels are for.*QuantSwinBlock"):
        lower(twin, images[:1])


EXPORT = """
import sys
import torch
from qswin.qat.lowering.lower import lower
from tests.helpers import twin_of

torch.manual_seed(0)
images = torch.randn(6, 3, 32, 32)
lowered = lower(twin_of(images, name=sys.argv[1]), images[:1])
batch = torch.export.Dim("batch", min=2, max=64)
program = torch.export.export(lowered, (images[:2],), dynamic_shapes=((batch,) + (torch.export.Dim.STATIC,) * 3,))
print(sum("qswin" in str(node.target) for node in program.graph.nodes))
with torch.inference_mode():
    print(torch.equal(program.module()(images), lowered(images)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), [(V1, 4 * 7 + 2 + 1 + 3), (V2, 4 * 9 + 3 + 1 + 3)])
def test_export_traces_every_kernel(name, kernels):
    """For any batch; in a process of its own, for the interpreter's kernels cannot be traced."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", EXPORT, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(kernels), "True"]  # of four blocks, a merging, stem, norm and classifier
