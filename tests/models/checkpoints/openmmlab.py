"""A Swin with OpenMMLab's names and order of columns, written from its description: patch merging by nn.Unfold.

OpenMMLab's packages pin old libraries, so they are no part of the tests' environment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WindowMSA(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        across = (columns[:, None] - columns[None, :]) + window - 1
        self.register_buffer(
            "relative_position_index", (rows[:, None] - rows[None, :] + window - 1) * (2 * window - 1) + across
        )
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(windows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, dim))


class ShiftWindowMSA(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.shift, self.window = shift, window
        self.w_msa = WindowMSA(dim, heads, window)

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * windows, N, C)."""
        side = self.window
        x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        shift = 0 if height <= self.window else self.shift
        regions = torch.bucketize(
            torch.arange(height), torch.tensor([height - self.window, height - shift]), right=True
        )
        region = self.cut((regions[:, None] * 3 + regions[None, :])[None, :, :, None].float()).squeeze(-1)
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0) if shift else None
        x = self.w_msa(self.cut(x.roll((-shift, -shift), (1, 2))), mask)
        across = width // self.window
        x = (
            x.reshape(batch, -1, across, self.window, self.window, dim)
            .transpose(2, 3)
            .reshape(batch, height, width, dim)
        )
        return x.roll((shift, shift), (1, 2))


class FFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.0))
        self.layers = nn.Sequential(first, nn.Linear(4 * dim, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), ShiftWindowMSA(dim, heads, window, shift)
        self.norm2, self.ffn = nn.LayerNorm(dim), FFN(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        x = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(x)).unflatten(1, (half, -1))


class Stage(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, window: int, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window, window // 2 * (index % 2)) for index in range(depth))
        self.downsample = PatchMerging(dim) if merge else None


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection, self.norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)


class Backbone(nn.Module):
    def __init__(self, dim: int, depths: list[int], heads: list[int], window: int, norms: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        last = len(depths) - 1
        self.stages = nn.ModuleList(
            Stage(dim << i, depth, heads[i], window, i < last) for i, depth in enumerate(depths)
        )
        for stage in range(len(depths) - norms, len(depths)):
            self.add_module(f"norm{stage}", nn.LayerNorm(dim << stage))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.norm(self.patch_embed.projection(x).permute(0, 2, 3, 1))
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x)
            x = x if stage.downsample is None else stage.downsample(x)
        return self.get_submodule(f"norm{len(self.stages) - 1}")(x)


class Head(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, classes)


class OpenMMLabSwin(nn.Module):
    """(B, 3, H, W) -> (B, classes). `norms` feature maps, the deepest ones, have a norm, as `out_indices` says."""

    def __init__(
        self, dim: int, depths: list[int], heads: list[int], window: int, classes: int, norms: int = 1
    ) -> None:
        super().__init__()
        self.backbone = Backbone(dim, depths, heads, window, norms)
        self.head = Head(dim << (len(depths) - 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.backbone(x).mean(dim=(1, 2)))
