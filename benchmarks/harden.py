"""A float checkpoint that computes what another one does and is hard to quantize: a stress test for calibration.

python -m benchmarks.harden --model swin_tiny_patch4_window7_224 --checkpoint FILE --out OUT.safetensors \\
    [--config configs/swin_tiny_tinyimagenet.yaml] [model.num_classes=200 ...]

One channel in twenty of a tensor is made up to `--largest` times as large, and the linear that reads the tensor divides
its column by the same factor. This is exact between a LayerNorm and the next linear, and between v and proj. It is not
behind GELU, which does not commute with a factor.

Nor is it in the residual stream of a pre-norm network (Swin V1, ViT): every LayerNorm divides by the deviation over all
channels, so that one large channel would change the others. In Swin V2 the norms are behind the branches and linears
read the stream: there its channels get massive activations, in all stages but the last, whose stream ends in a norm.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from qswin.qat.config import load_config
from qswin.qat.float_model import build_float_model

SHARE = 0.05  # of the channels are made large


class Channels(NamedTuple):
    """The channels of an activation: parameters whose first dimension makes them, and the linears that read them.

    A linear may read a multiple of C columns: patch merging puts the C channels of four tokens side by side.
    """

    makers: list[Tensor]
    readers: list[nn.Linear]


def harden(model: nn.Module, largest: float, seed: int) -> nn.Module:
    """A copy of a Swin V1, Swin V2 or ViT of timm that gives the same logits, up to float32's rounding.

    Args:
        largest: channels are made up to this many times as large.

    Raises:
        ValueError: the model has nothing that could be scaled without changing what it computes; or `largest` is not
            above 1.
    """
    if not largest > 1:
        raise ValueError(f"largest={largest} makes no channel larger; give a number above 1")
    twin = copy.deepcopy(model)
    activations = [*_before_linears(twin), *_values(twin), *_streams(twin), *_pooled(twin)]
    if not activations:
        raise ValueError(f"{type(model).__name__} has nothing to scale; give a Swin V1, Swin V2 or ViT of timm")
    generator = torch.Generator().manual_seed(seed)
    for activation in activations:
        _scale(activation, largest, generator)
    return twin


@torch.no_grad()
def _scale(activation: Channels, largest: float, generator: torch.Generator) -> None:
    """Multiplies a few channels by factors between sqrt(largest) and `largest`, log-uniform."""
    count = len(activation.makers[0])
    chosen = torch.randperm(count, generator=generator)[: max(1, round(SHARE * count))]
    factors = torch.ones(count)
    factors[chosen] = largest ** (1 + torch.rand(len(chosen), generator=generator)).div(2)
    for maker in activation.makers:
        maker.mul_(factors.reshape(-1, *[1] * (maker.ndim - 1)))
    for reader in activation.readers:
        reader.weight.div_(factors.repeat(reader.in_features // count))


def _affine(*norms: nn.Module) -> list[Tensor]:
    return [parameter for norm in norms for parameter in (norm.weight, norm.bias) if parameter is not None]


def _before_linears(model: nn.Module) -> Iterator[Channels]:
    """What a pre-norm block's LayerNorms, and Swin V1's patch merging, give the next linear."""
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock | Block):
            yield Channels(_affine(module.norm1), [module.attn.qkv])
            yield Channels(_affine(module.norm2), [module.mlp.fc1])
        elif isinstance(module, PatchMerging):
            yield Channels(_affine(module.norm), [module.reduction])


def _values(model: nn.Module) -> Iterator[Channels]:
    """v, the last rows of qkv; the attention's output has its channels."""
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock | SwinTransformerV2Block | Block):
            attention = module.attn
            if isinstance(getattr(attention, "norm", None), nn.LayerNorm):  # it stands between v and proj
                continue
            rows = attention.proj.in_features
            bias = attention.v_bias if isinstance(module, SwinTransformerV2Block) else attention.qkv.bias
            makers = [attention.qkv.weight[-rows:], *([] if bias is None else [bias[-rows:]])]
            yield Channels(makers, [attention.proj])


def _streams(model: nn.Module) -> Iterator[Channels]:
    """Swin V2's residual streams, of every stage that another follows: norms write them, and linears read them."""
    if not isinstance(model, SwinTransformerV2):
        return
    stages = list(model.layers)
    for index, (stage, following) in enumerate(zip(stages, stages[1:], strict=False)):
        begins = stage.downsample.norm if index else model.patch_embed.norm
        norms = [begins, *(norm for block in stage.blocks for norm in (block.norm1, block.norm2))]
        readers = [linear for block in stage.blocks for linear in (block.attn.qkv, block.mlp.fc1)]
        yield Channels(_affine(*norms), [*readers, following.downsample.reduction])


def _pooled(model: nn.Module) -> Iterator[Channels]:
    """What the last LayerNorm gives the head; pooling keeps the channels apart."""
    if isinstance(model, SwinTransformer | SwinTransformerV2 | VisionTransformer):
        head = getattr(model.head, "fc", model.head)
        norm = next((m for m in (getattr(model, "fc_norm", None), model.norm) if isinstance(m, nn.LayerNorm)), None)
        if norm is not None and isinstance(head, nn.Linear):
            yield Channels(_affine(norm), [head])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="OUT.safetensors, for model.checkpoint=")
    parser.add_argument("--config", type=Path, help="a config file that describes the model")
    parser.add_argument("--largest", type=float, default=100, help="channels become up to this many times as large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the config's")
    args = parser.parse_args()
    settings = [f"model.name={args.model}", f"model.checkpoint={args.checkpoint}", "data.root=unused", "run=unused"]
    config = load_config(args.config, [*args.overrides, *settings])
    floating = build_float_model(config.model, config.data.preprocessing)
    model, preprocessing = floating.model, floating.preprocessing
    twin = harden(model, args.largest, args.seed).eval()
    images = torch.randn(4, 3, *preprocessing.size, generator=torch.Generator().manual_seed(args.seed))
    with torch.inference_mode():
        expected, found = model(images), twin(images)
    apart = float((found - expected).abs().max() / expected.abs().max())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in twin.state_dict().items()}, args.out)
    print(json.dumps({"out": str(args.out), "largest": args.largest, "seed": args.seed, "logits_apart": apart}))


if __name__ == "__main__":
    main()
