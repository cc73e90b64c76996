"""A calibrated model lowered to INT8 or FP8 arithmetic: blocks, patch mergings, stem and classifier become kernels.

The lowered model computes what the fake-quantized one does: weights, and activations between the kernels, are stored as
levels of the format, and the residual stream is float. Recipe `attention`, or `attention-fp8`, has the sites that it
needs.
"""

import copy
import functools
from typing import Any

import torch
from timm.layers import ClassifierHead, PatchEmbed
from torch import Tensor, nn

from qswin.calib.grid import FP8, INT8, UINT8
from qswin.models.discovery import offers
from qswin.qat import lowering
from qswin.qat.lowering.layers import LoweredHead, LoweredLayerNorm, LoweredPatchEmbed, LoweredPatchProjection
from qswin.qat.quant.blocks import input_sizes
from qswin.qat.quant.layers import QuantLinear
from qswin.qat.quant.quantizers import quantizers


@functools.cache
def parts() -> dict[type, Any]:
    """{type of a twin: the class it becomes}, what the modules of lowering/ offer as PARTS.

    Such a class is made of the twin, its name, and the second and third size of what it gets: the height and width of
    (B, H, W, C), the tokens and channels of (B, N, C).
    """
    found: dict[type, Any] = {}
    for more in offers(lowering, "PARTS"):
        found |= more
    return found


def lower(twin: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy that computes in the twin's format, INT8 or FP8.

    Args:
        twin: a quantized model whose blocks are among `parts` (Swin V1 and V2, ViT), calibrated with recipe
            `attention` or `attention-fp8`.
        image: (1, 3, H, W) float32 of the size that the model is for: each block's place in it becomes an index.
        dtype: of the residual stream and of what is not lowered. Images may be of it or of float32; logits are float32.

    Raises:
        ValueError: a site that the kernels need is in float, of another format or not calibrated, a site that they lack
            is quantized, or one scales channels that they do not (it is named); or no block is among `parts`.
    """
    check_one_format(twin)
    lowered = copy.deepcopy(twin).eval()
    sizes = input_sizes(lowered, [module for module in lowered.modules() if type(module) in parts()], image)
    if not sizes:
        known = ", ".join(kind.__name__ for kind in parts())
        raise ValueError(
            f"this model has no block that the kernels are for; those are {known} (of Swin V1 and V2, and of ViT)"
        )
    for name, module in list(lowered.named_modules()):
        if module in sizes:
            _replace(lowered, name, parts()[type(module)](module, name, *sizes[module]))
        elif isinstance(module, PatchEmbed):
            stem = LoweredPatchProjection if isinstance(module.norm, nn.Identity) else LoweredPatchEmbed
            _replace(lowered, name, stem(module, name, dtype))
        elif isinstance(module, ClassifierHead) and isinstance(module.fc, QuantLinear):
            averages = (module.input_fmt, module.global_pool.pool_type) == ("NHWC", "avg")
            _replace(lowered, name if averages else f"{name}.fc", LoweredHead(module.fc, f"{name}.fc"))
    for name, module in list(lowered.named_modules()):
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            _replace(lowered, name, LoweredLayerNorm(module))
        elif isinstance(module, QuantLinear):
            _replace(lowered, name, LoweredHead(module, name))
    for parameter in lowered.parameters():  # not the buffers: the kernels' scales stay float32
        parameter.data = parameter.data.to(dtype)
    return lowered


def check_one_format(twin: nn.Module) -> None:
    """Raises ValueError, naming the first site at fault, unless all sites are in INT8, or all in FP8.

    With INT8, the probabilities of attention may be unsigned.
    """
    kept = {quantizer.site: quantizer.spec.grid.name for quantizer in quantizers(twin)}
    first = next(iter(kept.values()), INT8.name)
    for site, name in kept.items():
        allowed = {first} & {INT8.name, FP8.name}
        if first == INT8.name and site.endswith("attn.probs"):
            allowed.add(UINT8.name)
        if name not in allowed:
            what = "the kernels need all sites in int8, or all in fp8: calibrate with recipe=attention or attention-fp8"
            raise ValueError(f"{site} is in {name}; {what}")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
