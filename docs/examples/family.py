"""A family of models of your own, without a change in qswin: registered, quantized, calibrated, saved and exported."""

import torch
from torch import nn

import qswin
from qswin.models.family import Family
from qswin.models.registry import register_family
from qswin.qat.quant.layers import QuantAdd, QuantMatMul
from qswin.qat.quant.rewrite import register_twins


# Your model, as you have it.
class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        attn = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return x + self.out(attn @ v)


class Toy(nn.Module):
    def __init__(self, num_classes=10, dim=32):
        super().__init__()
        self.num_classes = num_classes
        self.stem, self.blocks = nn.Conv2d(3, dim, 8, 8), nn.Sequential(Block(dim), Block(dim))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(dim=1))


# What you add: a twin of what has matmuls and residual adds. Linears and convolutions have twins already.
class QuantBlock(nn.Module):
    def __init__(self, block, site, quantizer):
        super().__init__()
        self.norm, self.qkv, self.out = block.norm, block.qkv, block.out  # the linears are twins by now
        self.qk = QuantMatMul(f"{site}.attn.q", f"{site}.attn.k", quantizer)
        self.av = QuantMatMul(f"{site}.attn.probs", f"{site}.attn.v", quantizer)
        self.add1 = QuantAdd(f"{site}.add1", quantizer)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        attn = (self.qk(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.add1(x, self.out(self.av(attn, v)))


def build(name, num_classes=None, pretrained=False, **settings):
    return Toy(num_classes or 10, **settings)


def preprocessing(model):
    return qswin.Preprocessing(size=(32, 32)).to_dict()


# Paths whose names the recipes do not know: the stem is a patch embedding, and `out` the projection of attention.
SITES = ((r"^stem$", "patch_embed"), (r"\.out$", ".proj"))

register_twins({Block: QuantBlock})
family = Family("toy", "classification", lambda: ["toy"], build, preprocessing, sites=SITES, settings=("dim",))
register_family(family)

# What you can do now: the same calls as for a Swin.
model = qswin.build_model("toy", num_classes=5, dim=64)
recipe = qswin.named_recipe("full")
quantized = qswin.quantize(model, recipe)
qswin.calibrate(quantized, [torch.randn(8, 3, 32, 32)])

size = qswin.Preprocessing(size=(32, 32))
description = qswin.Description({"name": "toy", "num_classes": 5, "dim": 64}, "ptq", size, recipe=recipe)
qswin.save_checkpoint("toy.safetensors", quantized, description)
qswin.save_onnx("toy.onnx", qswin.export_onnx(quantized, description), description.to_dict())
