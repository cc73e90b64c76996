"""Kernels compiled ahead of time, for architectures that need not be here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qswin.qat.bundle.assemble import DIVISIBLE, SCRATCH
from qswin.qat.bundle.contents import Cubin, Kernel

WARP = 32
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def compile_kernel(function: Any, kernel: Kernel, arch: int) -> Cubin:
    """The cubin of a kernel.

    Args:
        function: the Triton function.
        kernel: what it is compiled for.
        arch: such as 80.

    Raises:
        ValueError: the kernel needs more shared memory than the architecture has, or memory that the runner does not
            give.
    """
    target = GPUTarget("cuda", arch, WARP)
    names = list(kernel.types)
    types = {name: kind.removesuffix(DIVISIBLE) for name, kind in kernel.types.items()}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    marks = {
        (names.index(n),): [["tt.divisibility", 16]] for n, kind in kernel.types.items() if kind.endswith(DIVISIBLE)
    }
    source = ASTSource(function, types, constants, marks)
    compiled = triton.compile(source, target=target, options=kernel.options)
    metadata = compiled.metadata
    if metadata.shared > SHARED[arch]:
        what = f"needs {metadata.shared} bytes of shared memory, and compute capability {arch / 10} has {SHARED[arch]}"
        raise ValueError(f"{kernel.function} {what}; leave {arch} out of --arch")
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise ValueError(f"{kernel.function}: Triton {triton.__version__} makes a kernel that needs memory of its own")
    widths = ["32" if kind in ("fp32", "i32") else "64" for kind in types.values() if kind != "constexpr"]
    if parameter_widths(compiled.asm["ptx"]) != [*widths, *["64"] * len(SCRATCH)]:
        raise ValueError(f"{kernel.function}: Triton {triton.__version__} makes a kernel with other arguments than 3.8")
    return Cubin(compiled.asm["cubin"], metadata.name, metadata.shared, WARP * metadata.num_warps)


def parameter_widths(ptx: str) -> list[str]:
    """The bits of each parameter of a kernel, in order."""
    return re.findall(r"^\s*\.param \.[a-z]+(32|64)\b.*_param_\d+,?$", ptx, re.MULTILINE)


@contextmanager
def without_line_numbers() -> Iterator[None]:
    """While it is entered, Triton compiles without line numbers, which hold the paths of this machine.

    It is a setting of the process: threads that compile run inside of it.
    """
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        yield
