"""Kernels compiled for architectures that are not here."""

import os
import subprocess
import sys

import pytest

from qswin.qat.bundle.build import compile_all
from qswin.qat.bundle.cubins import parameter_widths

COMPILE = """
import sys, torch
from qswin.qat.bundle.assemble import specialize
from qswin.qat.bundle.cubins import SHARED, compile_kernel, without_line_numbers
from qswin.qat.kernels.launch import PLANS
from qswin.qat.kernels import pool_quantize

x, scale = torch.empty(4, 49, 96, dtype=torch.float16, device="meta"), torch.empty(96, device="meta")
launch = PLANS["qswin::pool_quantize"](x, scale, torch.int8)
kernel = specialize(launch).kernel
with without_line_numbers():
    cubin = compile_kernel(launch.kernel, kernel, 80)
    SHARED[86] = -1
    try:
        compile_kernel(launch.kernel, kernel, 86)
    except ValueError as error:
        print(error)
print(cubin.function, cubin.threads, cubin.shared, cubin.code[1:4], sys.argv[1].encode() in cubin.code)
"""


@pytest.mark.slow
def test_a_cubin_names_its_function_and_no_path_of_this_machine():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    done = subprocess.run([sys.executable, "-c", COMPILE, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, compiled = done.stdout.splitlines()
    assert refused.endswith("bytes of shared memory, and compute capability 8.6 has -1; leave 86 out of --arch")
    assert compiled == "_pool_quantize_kernel 32 0 b'ELF' False"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted")
def test_interpreted_kernels_cannot_be_compiled(made):
    with pytest.raises(ValueError, match="while TRITON_INTERPRET is set"):
        compile_all([len], made.bundle.manifest.kernels[:1], 80)


PTX = """
.visible .entry _kernel(
\t.param .u64 .ptr .global .align 1 _kernel_param_0,
\t.param .u32 _kernel_param_1,
\t.param .b64 _kernel_param_2
)
{
\tld.param.b64 %rd1, [_kernel_param_0];
"""


def test_a_kernels_parameters_are_counted():
    """A release of Triton may add one, which the launches must then have."""
    assert parameter_widths(PTX) == ["64", "32", "64"]
