"""The kernels as machine code of a GPU that is not there, and as Inductor reads them."""

import json
import os
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def compiled():
    command = [sys.executable, "-m", "tests.qat.kernels.compiled"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_floats_are_narrowed_before_they_are_used(compiled):
    """Inductor may pass them as float64."""
    for name, kernel in compiled.items():
        arithmetic = re.findall(r"\b(?:add|sub|mul|fma|div|rsqrt|max|min)\.[\w.]*f64", kernel["code"])
        assert not arithmetic, name
        assert "mma.sync" in kernel["code"] or "norm" in name, name  # the products are the integer units'


def test_inductor_sees_that_kernels_write_to_their_result_only(compiled):
    """What it believes to be written to, it copies before each call."""
    assert {name: kernel["written"] for name, kernel in compiled.items()} == dict.fromkeys(compiled, ["out_ptr"])
