"""The kernel of docs/examples, in Triton's interpreter or on a GPU."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "kernel.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_of_a_kernel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and not interpreted")
def test_the_kernel_computes_what_its_reference_does(example):
    """Scales that are powers of two make every sum exact, so that ties show which way each rounds."""
    x, y = random_int8(3, 700), random_int8(3, 700)
    ours = example.add_quantize._init_fn(x.to(DEVICE), y.to(DEVICE), 0.5, 1.25).cpu()
    expected = (x.double() * 0.5 + y.double() * 1.25).round().clamp(-128, 127)
    assert torch.equal(ours.double(), expected)
    assert ours.min() == -128 and ours.max() == 127  # some are saturated
    assert torch.equal(example.add_quantize_reference(x, y, 0.5, 1.25), ours)


def test_the_operator_is_the_reference_on_a_cpu(example):
    x, y = random_int8(5, 9), random_int8(5, 9)
    assert torch.equal(
        torch.ops.qswin_example.add_quantize(x, y, 0.3, 0.7), example.add_quantize_reference(x, y, 0.3, 0.7)
    )
