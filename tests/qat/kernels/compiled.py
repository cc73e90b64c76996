"""Prints, for each kernel, its machine code for compute capability 8.0 and what Inductor believes it writes to. No GPU.

    TRITON_INTERPRET=0 python -m tests.qat.kernels.compiled

A process of its own, for the tests' process runs kernels in the interpreter.
"""

import json
from typing import Any

import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qswin.qat.kernels import attention, linear, norm_add, norm_quantize, patch_embed

TARGET = GPUTarget("cuda", 80, 32)
DTYPES = {"*i8": torch.int8, "*i32": torch.int32, "*fp16": torch.float16, "*fp32": torch.float32}
LINEAR = {"N": 384, "K": 96, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8}
NORM = {"CHANNELS": 96, "BLOCK_ROWS": 4, "BLOCK_CHANNELS": 128}
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
WINDOWS = {"CHANNELS": 96, "HEAD_DIM": 32, "BLOCK_TOKENS": 64, "WINDOWS_PER_PROGRAM": 1}
FLOATS = {"scale_ptr": "*fp32", "bias_ptr": "*fp32", "token_ids_ptr": "*i32", "qk_scale_ptr": "*fp32"}
FLOATS |= {"inv_scale_ptr": "*fp32"}
WEIGHTS = FLOATS | {"weight_ptr": "*i8"}
NORMS = FLOATS | {"weight_ptr": "*fp32", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32"}
# name: (kernel, its pointers' types, its constants)
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "linear": (linear._linear_kernel, WEIGHTS | {"x_ptr": "*i8", "out_ptr": "*i8"}, LINEAR | {"GELU": True}),
    "add": (linear._linear_add_kernel, WEIGHTS | {"x_ptr": "*i8", "shortcut_ptr": "*fp16", "out_ptr": "*fp16"}, LINEAR),
    "norm_quantize": (
        norm_quantize._norm_quantize_kernel,
        NORMS | {"x_ptr": "*fp16", "out_ptr": "*i8"},
        NORM | {"TOKENS": 1, "NORM": True},
    ),
    "gather: no norm": (
        norm_quantize._norm_quantize_kernel,
        NORMS | {"x_ptr": "*fp16", "out_ptr": "*i8"},
        NORM | {"TOKENS": 4, "NORM": False},
    ),
    "norm_add": (
        norm_add._norm_add_kernel,
        NORMS | {"y_ptr": "*fp16", "shortcut_ptr": "*fp16", "out_ptr": "*fp16"},
        NORM,
    ),
    "patch_embed": (
        patch_embed._patch_embed_kernel,
        NORMS | {"image_ptr": "*fp16", "weight_ptr": "*i8", "out_ptr": "*fp16"},
        IMAGE,
    ),
    "attention": (
        attention._window_attention_kernel,
        FLOATS | {"qkv_ptr": "*i8", "bias_ptr": "*fp16", "out_ptr": "*i8"},
        WINDOWS | {"NUM_TOKENS": 49, "COSINE": False},
    ),
    "cosine": (
        attention._window_attention_kernel,
        FLOATS | {"qkv_ptr": "*fp16", "bias_ptr": "*fp16", "out_ptr": "*i8"},
        WINDOWS | {"NUM_TOKENS": 64, "COSINE": True},
    ),
}


def is_float(name: str) -> bool:
    return name in ("eps", "av_scale") or name.endswith("inv_scale")


def machine_code(name: str) -> str:
    """PTX, Python floats being typed as torch 2.11's Inductor types them."""
    kernel, pointers, constants = KERNELS[name]
    names = kernel.arg_names
    types = {n: pointers.get(n, "fp64" if is_float(n) else "i32") for n in names} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()})
    return triton.compile(source, target=TARGET, options={"num_warps": 4}).asm["ptx"]


def written(name: str) -> list[str]:
    """The arguments that Inductor finds a store into."""
    kernel, pointers, constants = KERNELS[name]
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

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    print(json.dumps({name: {"code": machine_code(name), "written": written(name)} for name in KERNELS}))
