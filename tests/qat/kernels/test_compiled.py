"""The kernels as machine code of GPUs that are not there: what Inductor makes of their arguments must not reach the arithmetic."""

import json
import os
import re
import subprocess
import sys

COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qat.kernels import attention, linear, norm_add, norm_quantize, patch_embed

LINEAR = dict(N=384, K=96, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8)
NORM = dict(CHANNELS=96, BLOCK_ROWS=4, BLOCK_CHANNELS=128)
IMAGE = dict(COLOURS=3, HEIGHT=32, WIDTH=32, SIDE=4, CHANNELS=96, BLOCK=64, BLOCK_K=64, BLOCK_CHANNELS=128)
kernels = {
    "linear": (linear._kernel, "*i8", "*i8", LINEAR | dict(GELU=True)),
    "add": (linear._add_kernel, "*i8", "*fp16", LINEAR),
    "norm_quantize": (norm_quantize._kernel, "*fp16", "*i8", NORM | dict(PARTS=1, NORM=True)),
    "norm_add": (norm_add._kernel, "*fp16", "*fp16", NORM),
    "patch_embed": (patch_embed._kernel, "*fp16", "*fp16", IMAGE),
    "attention": (attention._kernel, "*i8", "*i8", dict(TOKENS=49, CHANNELS=96, HEAD=32, BLOCK=64, WINDOWS=1, COSINE=False)),
    "cosine": (attention._kernel, "*fp16", "*i8", dict(TOKENS=64, CHANNELS=96, HEAD=32, BLOCK=64, WINDOWS=1, COSINE=True)),
}


def kind(kernel, position, name):
    _, first, last, constants = kernels[kernel]
    if name in constants:
        return "constexpr"
    if name in ("eps", "inverse") or name.endswith(("_inverse", "av_scale")):
        return "fp64"  # as torch 2.11's Inductor passes Python floats
    if not name.endswith("_ptr"):
        return "i32"
    whole = {"weight_ptr": "*fp32" if "norm" in kernel else "*i8", "index_ptr": "*i32", "shortcut_ptr": "*fp16"}
    return first if position == 0 else last if name == "out_ptr" else whole.get(name, "*fp32")


def machine_code(kernel):
    function, _, _, constants = kernels[kernel]
    names = function.arg_names
    signature = {name: kind(kernel, position, name) for position, name in enumerate(names)}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4}).asm["ptx"]


print(json.dumps({kernel: machine_code(kernel) for kernel in kernels}))
"""


def test_floats_of_inductor_are_narrowed_before_they_are_used():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout)
    assert len(codes) == 7
    for kernel, code in codes.items():
        arithmetic = re.findall(r"\b(?:add|sub|mul|fma|div|rsqrt|max|min)\.[\w.]*f64", code)
        assert not arithmetic, kernel
        assert "mma.sync" in code or "norm" in kernel, kernel  # the products are the integer units'
