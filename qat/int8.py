"""A calibrated Swin V1 lowered to integer arithmetic: its blocks and patch mergings become calls of qat.kernels.

What the lowered model computes is what the fake-quantized one does, in INT8: weights are stored as integers, activations
between the kernels are integers, and the residual stream is float. Recipe `attention` has the sites that it needs.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.attention import padded_bias, window_attention
from qat.kernels.linear import linear_add, linear_float, linear_gelu_quantize, linear_quantize
from qat.kernels.norm_quantize import norm_quantize
from qat.quantizers import TensorQuantizer
from qat.twins.swin import QuantPatchMerging, QuantSwinBlock, _merge_2x2


def lower(twin: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy whose blocks and patch mergings compute in INT8.

    Args:
        twin: a quantized Swin V1, calibrated with recipe `attention` (8 bits).
        image: (1, 3, H, W) float32 of the size that the model is for: each block's place in it becomes an index.
        dtype: of the images that it will get, of the residual stream and of what is not lowered (stem, last norm, head).

    Raises:
        ValueError: a site that the kernels need is in float, of other bits or not calibrated, or one that they have not is
            quantized (it is named); the model is no Swin V1.
    """
    lowered = copy.deepcopy(twin).eval()
    sizes = _input_sizes(lowered, image)
    if not sizes:
        raise ValueError("the INT8 kernels are for Swin V1; this model has none of its blocks")
    for name, (height, width) in sizes.items():
        parent, _, child = name.rpartition(".")
        module = lowered.get_submodule(name)
        kind = Int8Block if isinstance(module, QuantSwinBlock) else Int8PatchMerging
        setattr(lowered.get_submodule(parent), child, kind(module, name, height, width))  # type: ignore[arg-type]
    for parameter in lowered.parameters():  # not the buffers: ranges and the kernels' scales stay float32
        parameter.data = parameter.data.to(dtype)
    return lowered


@torch.no_grad()
def _input_sizes(model: nn.Module, image: Tensor) -> dict[str, tuple[int, int]]:
    """(H, W) of what each block and patch merging of V1 gets."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) in (QuantSwinBlock, QuantPatchMerging):

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                sizes[name] = (inputs[0].shape[1], inputs[0].shape[2])

            handles.append(module.register_forward_pre_hook(record))
    model(image)
    for handle in handles:
        handle.remove()
    return sizes


def _scale(quantizer: Any, site: str) -> Tensor:
    """A site's scale, amax / 127. Raises ValueError unless it is quantized to 8 bits and calibrated."""
    if not isinstance(quantizer, TensorQuantizer) or quantizer.spec.bits != 8:
        kind = f"of {quantizer.spec.bits} bits" if isinstance(quantizer, TensorQuantizer) else "in float"
        raise ValueError(f"{site} is {kind}; the INT8 kernels need it at 8 bits: calibrate with recipe=attention")
    quantizer.check_range()
    return (quantizer.amax / quantizer.spec.qmax).detach()


class Int8Linear(nn.Module):
    """A QuantLinear on integers: integer weights, each column's scale, the bias. x: (M, K) int8, levels of `input_scale`."""

    def __init__(self, linear: Any, site: str) -> None:
        super().__init__()
        self.input_scale = float(_scale(linear._input_quantizer, site))
        weight = linear.weight.detach().float()
        scale = _scale(linear._weight_quantizer, site).reshape(-1, 1)
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("weight", (weight / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", (scale * self.input_scale).expand(len(weight), 1).flatten().contiguous())
        self.register_buffer("bias", bias.to(weight.device, copy=True))
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor

    def give_levels(self, scales: Tensor) -> None:
        """Makes `quantize` give levels of these scales, one a column: they become part of its own."""
        self.scale /= scales
        self.bias /= scales

    def quantize(self, x: Tensor) -> Tensor:
        """(M, N) int8, levels of the scales that `give_levels` got."""
        return linear_quantize(x, self.weight, self.scale, self.bias)

    def gelu_quantize(self, x: Tensor, scale: float) -> Tensor:
        """(M, N) int8: GELU's result as levels of a scale."""
        return linear_gelu_quantize(x, self.weight, self.scale, self.bias, 1 / scale)

    def float(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """(M, N) of a dtype."""
        return linear_float(x, self.weight, self.scale, self.bias, dtype)

    def add(self, x: Tensor, shortcut: Tensor, index: Tensor) -> Tensor:
        """shortcut (B, L, N) plus the result, whose rows belong where `index` says; see `linear_add`."""
        return linear_add(x, self.weight, self.scale, self.bias, shortcut, index)


class Int8Norm(nn.Module):
    """A LayerNorm whose result is quantized for the linear behind it, and the rows that it reads."""

    def __init__(self, norm: Any, scale: float, index: Tensor) -> None:
        super().__init__()
        self.eps, self.inverse = norm.eps, 1 / scale
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())
        self.register_buffer("index", index.to(norm.weight.device, torch.int32))
        self.weight: Tensor
        self.bias: Tensor
        self.index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) float -> (B * R, P * C) int8."""
        return norm_quantize(x, self.index, self.weight, self.bias, self.eps, self.inverse)


class Int8Block(nn.Module):
    """A Swin V1 block in seven kernels. x: (B, H, W, C)."""

    def __init__(self, block: QuantSwinBlock, site: str, height: int, width: int) -> None:
        super().__init__()
        attn = block.attn
        for name, add in (("add1", block.add1), ("add2", block.add2)):
            if any(isinstance(q, TensorQuantizer) for q in (add._input_quantizer, add._other_quantizer)):
                raise ValueError(f"{site}.{name} is quantized; the kernels add in float: calibrate with recipe=attention")
        self.qkv, self.proj = Int8Linear(attn.qkv, f"{site}.attn.qkv"), Int8Linear(attn.proj, f"{site}.attn.proj")
        self.fc1, self.fc2 = Int8Linear(block.mlp.fc1, f"{site}.mlp.fc1"), Int8Linear(block.mlp.fc2, f"{site}.mlp.fc2")
        if not (isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"):
            raise ValueError(f"{site}.mlp: the INT8 kernels have exact GELU only, not {block.mlp.act}")
        self.norm1 = Int8Norm(block.norm1, self.qkv.input_scale, window_index(block, height, width))
        self.norm2 = Int8Norm(block.norm2, self.fc1.input_scale, torch.arange(height * width)[:, None])
        quantizers = {"q": attn.qk._input_quantizer, "k": attn.qk._other_quantizer}
        quantizers |= {"probs": attn.av._input_quantizer, "v": attn.av._other_quantizer}
        q, k, probs, v = (float(_scale(quantizer, f"{site}.attn.{name}")) for name, quantizer in quantizers.items())
        self.qkv.give_levels(
            torch.tensor([q / attn.scale, k, v], device=self.qkv.scale.device).repeat_interleave(len(self.proj.weight))
        )
        self.register_buffer("position_bias", padded_bias(attn._bias(block.attn_mask).detach().half()))
        self.position_bias: Tensor
        self.tokens = attn.relative_position_index.shape[0]
        self.qk_scale, self.probs_inverse, self.av_scale = q * k, 1 / probs, probs * v / self.proj.input_scale

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.flatten(1, 2)
        h = self.qkv.quantize(self.norm1(x))
        h = window_attention(h, self.position_bias, self.tokens, self.qk_scale, self.probs_inverse, self.av_scale)
        x = self.proj.add(h, x, self.norm1.index.flatten())
        h = self.fc1.gelu_quantize(self.norm2(x), self.fc2.input_scale)
        x = self.fc2.add(h, x, self.norm2.index.flatten())
        return x.view(size)


class Int8PatchMerging(nn.Module):
    """Patch merging of Swin V1 in two kernels. (B, H, W, C) -> (B, H/2, W/2, out_dim)."""

    def __init__(self, merging: QuantPatchMerging, site: str, height: int, width: int) -> None:
        super().__init__()
        self.reduction = Int8Linear(merging.reduction, f"{site}.reduction")
        places = _merge_2x2(_places(height, width))
        self.size = places.shape[1:3]
        self.norm = Int8Norm(merging.norm, self.reduction.input_scale, places.flatten(0, 2).long() - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction.float(self.norm(x.flatten(1, 2)), x.dtype).view(x.shape[0], *self.size, -1)


def _places(height: int, width: int) -> Tensor:
    """(1, H, W, 1): each token's number from 1; the zeros that padding adds are then no token's."""
    return torch.arange(1, height * width + 1).float().view(1, height, width, 1)


def window_index(block: QuantSwinBlock, height: int, width: int) -> Tensor:
    """(R, 1): the token of each place in the block's windows, rolled and padded as the block does it; -1 where none is."""
    return block.to_windows(_places(height, width)).flatten()[:, None].long() - 1
