"""The launch list over one workspace gives the lowered model's logits: by references to the bit, by kernels nearly."""

import os
import struct
import subprocess
import sys

import pytest
import torch

from qswin.qat.bundle import interpreter
from qswin.qat.bundle.contents import Buffer
from qswin.qat.bundle.format import write_bundle
from qswin.qat.bundle.interpreter import interpret
from qswin.qat.bundle.reader import read_bundle
from qswin.qat.kernels import attention, layer_norm, linear, norm_add, norm_quantize, patch_embed, pool_quantize
from tests.helpers import V1, V2
from tests.qat.bundle.small import make_bundle

MODULES = (attention, layer_norm, linear, norm_add, norm_quantize, patch_embed, pool_quantize)
FUNCTIONS = {name: value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")}
DTYPES = {"*i8": torch.int8, "*i32": torch.int32, "*fp16": torch.float16, "*fp32": torch.float32}
DTYPES |= {"*fp8e4nv": torch.float8_e4m3fn}
MODELS = pytest.mark.parametrize(
    ("name", "recipe", "settings"),
    [
        (V1, "attention", {}),
        pytest.param(V1, "attention", {"img_size": 24, "window_size": 5}, marks=pytest.mark.slow),
        pytest.param(V2, "attention", {}, marks=pytest.mark.slow),
        pytest.param(V1, "attention-fp8", {}, marks=pytest.mark.slow),
        (V2, "attention-fp8", {}),
    ],
    ids=["V1", "V1, padded", "V2", "V1 in FP8", "V2 in FP8"],
)


@MODELS
def test_logits_are_the_lowered_models_to_the_bit(name, recipe, settings):
    made = make_bundle(name, recipe, **settings)
    bundle = read_bundle(write_bundle(made.bundle))
    for batch in (1, 4):
        images = made.images[-batch:]
        with torch.inference_mode():
            expected, found = made.lowered(images), interpret(bundle, images)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert expected.unique().numel() > batch


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [(V1, "attention"), pytest.param(V2, "attention-fp8", marks=pytest.mark.slow)],
    ids=["V1", "V2 in FP8"],
)
def test_the_stored_launches_run_in_tritons_interpreter(name, recipe):
    """Kernels with the grids, constants and arguments that are in the file, and nothing else.

    Each is compared with its reference on the same inputs: in FP8 one value that is rounded otherwise changes all
    logits of a small random model.
    """
    made = make_bundle(name, recipe)
    bundle, images = read_bundle(write_bundle(made.bundle)), made.images[:1]
    memory = interpreter._Memory(bundle, bundle.batches[0])
    memory.spaces["input"].view(torch.float32).copy_(images.flatten())
    for launch, call in zip(bundle.batches[0].launches, bundle.manifest.calls[0], strict=True):
        result = memory.tensor(call.result)
        launch_by_triton(bundle.manifest.kernels[launch.kernel], launch, memory)
        found = result.float().clone()
        interpreter._run(bundle, memory, launch, call)  # over the kernel's result
        expected = result.float().clone()
        difference = (found - expected).abs()
        assert difference.mean() <= 2e-3 * expected.abs().mean(), call.operator
        assert (difference > 1e-3 * expected.abs().max()).float().mean() <= 0.02, call.operator


def launch_by_triton(kernel, launch, memory):
    values = iter(launch.arguments)
    arguments = dict(kernel.constants)
    for name, kind in kernel.types.items():
        if kind != "constexpr":
            value = next(values)
            if isinstance(value, Buffer):
                space = memory.spaces[value.space]
                value = space[value.offset : value.offset + value.size].view(DTYPES[kind.removesuffix(":16")])
            arguments[name] = value
    assert list(values) == [None, None]
    FUNCTIONS[kernel.function][launch.grid](**arguments, **kernel.options)


def test_a_batch_that_it_does_not_hold_is_refused(made):
    with pytest.raises(ValueError, match="batch 2: the bundle has 1, 4"):
        interpret(made.bundle, made.images[:2])


@pytest.mark.parametrize("what", ["grid", "number", "buffer"])
def test_launches_that_are_not_the_operators_are_refused(made, what):
    """A file may be consistent in itself, and still not be what its operators do."""
    batch = made.bundle.batches[0]
    launch = batch.launches[0]
    values = list(launch.arguments)
    if what == "grid":
        launch = launch._replace(grid=(7, 1, 1))
    else:
        index = next(i for i, v in enumerate(values) if isinstance(v, Buffer if what == "buffer" else int | float))
        values[index] = values[index]._replace(size=16) if what == "buffer" else 77
        launch = launch._replace(arguments=tuple(values))
    changed = batch._replace(launches=(launch, *batch.launches[1:]))
    named = "grid" if what == "grid" else "launch"
    with pytest.raises(ValueError, match=f"^qswin::patch_embed: its {named} is not the one that this qswin plans"):
        interpret(made.bundle._replace(batches=(changed, made.bundle.batches[1])), made.images[:1])


@pytest.mark.slow
def test_it_knows_every_operator_by_itself():
    """In a process that has not lowered a model."""
    script = "from qswin.qat.bundle.interpreter import PLANS; print(*PLANS)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {name for name in interpreter.PLANS if name.startswith("qswin::")}


def test_floats_are_stored_as_float32(made):
    bundle = read_bundle(write_bundle(made.bundle))
    floats = [a for launch in bundle.batches[0].launches for a in launch.arguments if isinstance(a, float)]
    assert floats and all(struct.unpack("<f", struct.pack("<f", value))[0] == value for value in floats)
