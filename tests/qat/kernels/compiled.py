"""Prints, for each kernel, its code for a GPU that is not here, its spills and what Inductor believes it writes to.

    TRITON_INTERPRET=0 python -m tests.qat.kernels.compiled CAPABILITY FORMAT        # such as 80 int8, 90 fp8

A process of its own, for the tests' process runs kernels in the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qswin.qat.kernels import attention, layer_norm, linear, norm_add, norm_quantize, patch_embed, pool_quantize

DTYPES = {
    "*i8": torch.int8,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i32": torch.int32,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
}
LINEAR = {"N": 384, "K": 96, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
PLACES = {"ROWS_PER_IMAGE": 196, "NUM_TOKENS": 196}
NORM = {"CHANNELS": 96, "BLOCK_ROWS": 4, "BLOCK_CHANNELS": 128}
PLACED_NORM = NORM | PLACES
IMAGE = {
    "IN_CHANNELS": 3,
    "HEIGHT": 32,
    "WIDTH": 32,
    "PATCH": 4,
    "N": 96,
    "BLOCK_M": 64,
    "BLOCK_K": 64,
    "BLOCK_N": 128,
}
TILE = {"NORMALIZED": 0, "HEAD_DIM": 0, "WALK_STAGES": 0}
WINDOWS = {"CHANNELS": 96, "HEAD_DIM": 32, "WINDOWS_PER_PROGRAM": 1}
FLOATS = {"scale_ptr": "*fp32", "bias_ptr": "*fp32", "token_ids_ptr": "*i32", "qk_scale_ptr": "*fp32"}
FLOATS |= {"inv_scale_ptr": "*fp32"}
NORMS = FLOATS | {"weight_ptr": "*fp32", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32"}
LEVELS = {"int8": "*i8", "fp8": "*fp8e4nv"}


def kernels(level: str) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """{name: (kernel, its pointers' types, its constants)}, `level` being the type of a pointer to levels."""
    weights = FLOATS | {"weight_ptr": level}
    return {
        "linear": (
            linear._linear_kernel,
            weights | {"x_ptr": level, "out_ptr": level},
            LINEAR | TILE | {"GELU": True},
        ),
        "cosine": (
            linear._linear_kernel,
            weights | {"x_ptr": level, "out_ptr": level},
            LINEAR | {"GELU": False, "NORMALIZED": 256, "HEAD_DIM": 32, "WALK_STAGES": 0},
        ),
        "walk": (
            linear._linear_kernel,
            weights | {"x_ptr": level, "out_ptr": level},
            LINEAR | TILE | {"GELU": True, "WALK_STAGES": 2, "BLOCK_M": 128, "BLOCK_K": 128},
        ),
        "add": (
            linear._linear_add_kernel,
            weights | {"x_ptr": level, "shortcut_ptr": "*fp16", "out_ptr": "*fp16"},
            LINEAR | PLACES,
        ),
        "norm_quantize": (
            norm_quantize._norm_quantize_kernel,
            NORMS | {"x_ptr": "*fp16", "out_ptr": level},
            PLACED_NORM | {"TOKENS": 1, "NORM": True},
        ),
        "gather: no norm": (
            norm_quantize._norm_quantize_kernel,
            NORMS | {"x_ptr": "*fp16", "out_ptr": level},
            PLACED_NORM | {"TOKENS": 4, "NORM": False},
        ),
        "norm_add": (
            norm_add._norm_add_kernel,
            NORMS | {"y_ptr": "*fp16", "shortcut_ptr": "*fp16", "out_ptr": "*fp16"},
            PLACED_NORM,
        ),
        "norm": (
            layer_norm._layer_norm_kernel,
            {name: "*fp16" for name in ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")},
            NORM,
        ),
        "pool_quantize: no norm": (
            pool_quantize._pool_quantize_kernel,
            FLOATS | {"x_ptr": "*fp16", "out_ptr": level},
            {"CHANNELS": 96, "BLOCK_TOKENS": 16, "BLOCK_CHANNELS": 128},
        ),
        "patch_embed": (
            patch_embed._patch_embed_kernel,
            NORMS | {"image_ptr": "*fp16", "weight_ptr": level, "out_ptr": "*fp16"},
            IMAGE,
        ),
        **{
            f"attention of {tokens}": (
                attention._attention_kernel,
                FLOATS | {"qkv_ptr": level, "bias_ptr": "*fp16", "out_ptr": level},
                WINDOWS | attention_constants(tokens, level),
            )
            for tokens in (49, 144, 256, 576)
        },
    }


def attention_constants(tokens: int, level: str) -> dict[str, Any]:
    tiles = attention.tiles(tokens)
    sizes = {"NUM_TOKENS": tokens, "QUERIES": tiles.queries, "KEYS": tiles.keys, "MORE_KEYS": tiles.more_keys}
    return sizes | {"BIAS": tokens != 256, "UNSIGNED": level == "*i8" and tokens < 200}


def is_float(name: str) -> bool:
    return name in ("eps", "av_scale") or name.endswith("inv_scale")


def machine_code(target: GPUTarget, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """PTX, Python floats being typed as torch 2.11's Inductor types them, pointers as multiples of 16."""
    names = kernel.arg_names
    types = {n: pointers.get(n, "fp64" if is_float(n) else "i32") for n in names} | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()}, aligned)
    return triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]


class Assembled(NamedTuple):
    """What the assembler makes of PTX: bytes of registers that do not fit and go through memory, and instructions."""

    spilled: int
    instructions: int


def assemble(ptx: str) -> Assembled:
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    knobs = triton.knobs.nvidia
    ptxas = knobs.ptxas_blackwell if arch.startswith(("sm_10", "sm_12")) else knobs.ptxas
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={arch}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        command = [knobs.nvdisasm.path, "-c", "kernel.cubin"]
        code = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))
    return Assembled(spills, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)))


def written(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> list[str]:
    """The arguments that Inductor finds a store into."""
    with FakeTensorMode():
        arguments = {n: 1.5 if is_float(n) else 64 for n in kernel.arg_names}
        arguments |= {
            n: torch.empty(64, 64, dtype=DTYPES[pointers[n]], device="cuda") for n in arguments if n in pointers
        }
        return get_mutated_tensors(
            kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args({}), arguments | constants, {}
        )


class Driver:
    """What is asked of a GPU's driver when nothing is run."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0


def main(capability: str, number_format: str) -> None:
    target = GPUTarget("cuda", int(capability), 32)
    triton.runtime.driver.set_active(Driver(target))
    found = {}
    for name, (kernel, pointers, constants) in kernels(LEVELS[number_format]).items():
        code = machine_code(target, kernel, pointers, constants)
        found[name] = {"code": code, "written": written(kernel, pointers, constants), **assemble(code)._asdict()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
