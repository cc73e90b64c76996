"""A calibrated Swin lowered to integer arithmetic: blocks, patch mergings, stem and classifier become kernels.

What the lowered model computes is what the fake-quantized one does, in INT8: weights are stored as integers, activations
between the kernels are integers, and the residual stream is float. Recipe `attention` has the sites that it needs.
"""

import copy
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from qswin.qat.lowering.layers import Int8Head, Int8PatchEmbed
from qswin.qat.lowering.swin import Int8Block, Int8BlockV2, Int8PatchMerging, Int8PatchMergingV2
from qswin.qat.quant.layers import QuantLinear
from qswin.qat.quant.twins.swin import QuantPatchMerging, QuantPatchMergingV2, QuantSwinBlock, QuantSwinV2Block

# Made of a module, its name, and the height and width of what it gets.
PARTS: dict[type, Any] = {
    QuantSwinBlock: Int8Block,
    QuantSwinV2Block: Int8BlockV2,
    QuantPatchMerging: Int8PatchMerging,
    QuantPatchMergingV2: Int8PatchMergingV2,
}


def lower(twin: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy that computes in INT8.

    Args:
        twin: a quantized Swin V1 or V2, calibrated with recipe `attention` (8 bits).
        image: (1, 3, H, W) float32 of the size that the model is for: each block's place in it becomes an index.
        dtype: of the images that it will get, of the residual stream and of what is not lowered (last norm, pooling).

    Raises:
        ValueError: a site that the kernels need is in float, of other bits or not calibrated, or one that they have not is
            quantized (it is named); the model is no Swin.
    """
    lowered = copy.deepcopy(twin).eval()
    sizes = _input_sizes(lowered, image)
    if not sizes:
        raise ValueError("the INT8 kernels are for Swin V1 and V2; this model has none of their blocks")
    for name, module in list(lowered.named_modules()):
        if name in sizes:
            _replace(lowered, name, PARTS[type(module)](module, name, *sizes[name]))
        elif isinstance(module, PatchEmbed) and isinstance(module.norm, nn.LayerNorm):
            _replace(lowered, name, Int8PatchEmbed(module, name))
        elif name == "head.fc" and isinstance(module, QuantLinear):
            _replace(lowered, name, Int8Head(module, name))
    for parameter in lowered.parameters():  # not the buffers: the kernels' scales stay float32
        parameter.data = parameter.data.to(dtype)
    return lowered


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def _input_sizes(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """(H, W) of what each block and patch merging gets."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) in PARTS:

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                sizes[name] = (inputs[0].shape[1], inputs[0].shape[2])

            handles.append(module.register_forward_pre_hook(record))
    model(image)
    for handle in handles:
        handle.remove()
    return sizes
