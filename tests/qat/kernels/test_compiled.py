"""The kernels as machine code of GPUs that are not there, and as Inductor reads them."""

import json
import os
import re
import subprocess
import sys

import pytest

SLOW = pytest.mark.slow
# Compute capability, format, and the matrix instruction: Hopper's is wgmma, that of Blackwell's servers tcgen05.
TARGETS = [
    ("80", "int8", "mma.sync"),
    *(
        pytest.param(target, marks=SLOW)
        for target in (
            ("86", "int8", "mma.sync"),
            ("89", "fp8", "mma.sync"),
            ("89", "int8", "mma.sync"),
            ("90", "int8", "wgmma"),
            ("90", "fp8", "wgmma"),
            ("100", "int8", "tcgen05.mma"),
            ("100", "fp8", "tcgen05.mma"),
            ("120", "int8", "mma.sync"),
            ("120", "fp8", "mma.sync"),
        )
    ),
]


# Of INT8 kernels for 9.0, 7 % more than Triton 3.8 makes. fc1's tile has 32 outputs a thread, so 17 instructions each.
MOST_INSTRUCTIONS = {
    "linear": 600,
    "cosine": 522,
    "walk": 1000,
    "add": 582,
    "norm_quantize": 240,
    "attention of 49": 693,
    "attention of 144": 1395,
    "attention of 256": 1549,
    "attention of 576": 1660,
}


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: " ".join(target[:2]))
def compiled(request):
    capability, number_format, instruction = request.param
    command = [sys.executable, "-m", "tests.qat.kernels.compiled", capability, number_format]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), number_format, instruction


@pytest.mark.slow
def test_instructions_do_not_creep_back(compiled):
    """A kernel's time depends on more (docs/performance.md), but more is not seen without a GPU."""
    kernels, number_format, instruction = compiled
    if (number_format, instruction) != ("int8", "wgmma"):
        pytest.skip("counted for compute capability 9.0 and INT8")
    found = {name: kernels[name]["instructions"] for name in MOST_INSTRUCTIONS}
    assert not {name: count for name, count in found.items() if count > MOST_INSTRUCTIONS[name]}


def test_floats_are_narrowed_before_they_are_used(compiled):
    """Inductor may pass them as float64."""
    kernels, _, _ = compiled
    for name, kernel in kernels.items():
        arithmetic = re.findall(r"\b(?:add|sub|mul|fma|div|rsqrt|max|min)\.[\w.]*f64", kernel["code"])
        assert not arithmetic, name


def test_products_are_the_matrix_units_in_the_format(compiled):
    """On 9.0 and 10.0 FP8 products need 64 rows. Those of 16 (attention over 576 tokens) are exact ones in FP16."""
    kernels, number_format, instruction = compiled
    for name, kernel in kernels.items():
        few_rows = instruction != "mma.sync" and name == "attention of 576"
        kind = {"int8": r"s8\.s8", "fp8": r"f16\.f16" if few_rows else r"e4m3\.e4m3"}[number_format]
        if "norm" not in name:
            products = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", kernel["code"])
            assert products, name  # tcgen05 names the kind of format only, f8f6f4
            assert all(re.search(kind, each) or "tcgen05" in each for each in products), (name, set(products))
    assert instruction in kernels["linear"]["code"]


def test_registers_suffice(compiled):
    """What spills goes through memory: some bytes of the stem's kernel on 10.0, no other's."""
    kernels, _, _ = compiled
    allowed = {"patch_embed": 80}
    assert all(kernel["spilled"] <= allowed.get(name, 0) for name, kernel in kernels.items())


def test_inductor_sees_that_kernels_write_to_their_result_only(compiled):
    """What it believes to be written to, it copies before each call."""
    kernels, _, _ = compiled
    assert {name: kernel["written"] for name, kernel in kernels.items()} == dict.fromkeys(kernels, ["out_ptr"])
