"""The lowered model against the fake-quantized one, which rounds at the same places."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from qat.int8 import Int8Block, Int8PatchMerging, lower, window_index  # noqa: E402
from qat.ptq import calibrate  # noqa: E402
from qat.recipe import named_recipe  # noqa: E402
from qat.rewrite import quantize  # noqa: E402
from tests.conftest import V2, small_swin  # noqa: E402


def twin_of(images, recipe="attention", **settings):
    twin = quantize(small_swin(**settings), named_recipe(recipe) if isinstance(recipe, str) else recipe).eval()
    calibrate(twin, [images])
    return twin


@pytest.mark.parametrize("settings", [{}, {"img_size": 24, "window_size": 5}], ids=["even", "padded"])
def test_the_lowered_model_computes_what_the_twin_does(settings):
    """Block by block on the twin's own inputs: rounding flips then cannot add up."""
    images = torch.randn(6, 3, settings.get("img_size", 32), settings.get("img_size", 32))
    twin = twin_of(images, **settings)
    lowered = lower(twin, images[:1])
    inputs = {}
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    with torch.inference_mode():
        expected, found = twin(images), lowered(images)
        replaced = [name for name, module in lowered.named_modules() if isinstance(module, Int8Block | Int8PatchMerging)]
        assert len(replaced) == 5  # four blocks, one merging
        for name in replaced:
            theirs, ours = (model.get_submodule(name)(inputs[name]) for model in (twin, lowered))
            difference = (ours - theirs).abs()
            assert difference.mean() < 1e-3 * theirs.abs().mean()  # ties only: most values are equal
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_the_residual_stream_may_be_half(images):
    twin = twin_of(images)
    lowered = lower(twin, images[:1], torch.bfloat16)
    with torch.inference_mode():
        expected, found = twin(images), lowered(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_weights_are_stored_as_integers(images):
    lowered = lower(twin_of(images), images[:1])
    block = next(module for module in lowered.modules() if isinstance(module, Int8Block))
    assert block.fc1.weight.dtype == torch.int8 and block.fc1.weight.abs().max() == 127
    assert not any("blocks" in name for name, _ in lowered.named_parameters())


def test_every_token_is_in_one_window(images):
    twin = twin_of(images)
    block = twin.layers[0].blocks[1]  # a shifted one
    index = window_index(block, 16, 16).flatten()
    assert index.sort().values.tolist() == list(range(256))
    assert index[0] == 2 * 16 + 2  # rolled by half a window of four


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("gemm", r"attn\.q is in float; .*recipe=attention"),
        ("full", r"add1 is quantized; .*recipe=attention"),
        (dataclasses.replace(named_recipe("attention"), weight_bits=4), r"attn\.qkv is of 4 bits"),
    ],
)
def test_sites_that_do_not_fit_are_named(images, recipe, message):
    with pytest.raises(ValueError, match=message):
        lower(twin_of(images, recipe), images[:1])


def test_other_models_are_refused(images):
    with pytest.raises(ValueError, match="for Swin V1"):
        lower(twin_of(images, name=V2), images[:1])


EXPORT = """
import torch
from qat.int8 import lower
from tests.qat.test_int8 import twin_of

torch.manual_seed(0)
images = torch.randn(6, 3, 32, 32)
lowered = lower(twin_of(images), images[:1])
batch = torch.export.Dim("batch", min=2, max=64)
program = torch.export.export(lowered, (images[:2],), dynamic_shapes=((batch,) + (torch.export.Dim.STATIC,) * 3,))
print(sum("qswin" in str(node.target) for node in program.graph.nodes))
with torch.inference_mode():
    print(torch.equal(program.module()(images), lowered(images)))
"""


def test_export_traces_every_kernel():
    """For any batch; in a process of its own, for the interpreter's kernels cannot be traced."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", EXPORT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(4 * 7 + 2), "True"]  # of four blocks and a merging; and the program agrees
