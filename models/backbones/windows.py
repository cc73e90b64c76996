"""How a Swin's tokens are cut into windows, at any image size: timm shifts and then pads, other libraries pad first.

At sizes that the windows divide all of them compute the same. timm's blocks are in timm; those of the other libraries
are the classes here, whose parameters have timm's names.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

Pair = tuple[int, int]  # (height, width), in tokens
FAR = -100.0  # is added to the scores of tokens that were not neighbours before the shift


def _where_more_than_one(windows: "Windows", height: int, width: int) -> Pair:
    """torchvision: an axis is shifted where it has more than one window."""
    pairs = zip(windows.size, windows.shift, windows.padded(height, width), strict=True)
    shift_h, shift_w = (0 if window >= side else shift for window, shift, side in pairs)
    return shift_h, shift_w


def _if_larger_than_one(windows: "Windows", height: int, width: int) -> Pair:
    """transformers and mmpretrain: both axes are shifted if each is longer than a window."""
    return (0, 0) if height <= windows.size[0] or width <= windows.size[1] else windows.shift


def _always(windows: "Windows", height: int, width: int) -> Pair:
    """Libraries whose blocks know their shift from the start, or shift at any size."""
    return windows.shift


# {library: the shift at a size}
SHIFTS: dict[str, Callable[["Windows", int, int], Pair]] = {
    "timm": _always,
    "torchvision": _where_more_than_one,
    "huggingface": _if_larger_than_one,
    "huggingface-backbone": _always,
    "huggingface-v2": _always,
    "mmpretrain": _if_larger_than_one,
    "mmdetection": _always,
}
SHRINK = ("timm", "huggingface-v2")  # windows are as small as the feature map of the size that the model is built for


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a block.

    Args:
        size: of a window.
        shift: how far every second block's windows are shifted.
        padding: the library, a key of SHIFTS, whose way to fill up incomplete windows is taken.
    """

    size: Pair
    shift: Pair
    padding: str = "timm"

    @classmethod
    def of(cls, block: Any) -> "Windows":
        """Those of a float block."""
        return cls(tuple(block.window_size), tuple(block.shift_size), getattr(block, "padding", "timm"))

    def cut(self, x: Tensor) -> Tensor:
        """Shifts, pads and cuts: (B, H, W, C) -> (B * num_windows, N, C), N tokens a window."""
        shift_h, shift_w = self._shift(x.shape[1], x.shape[2])
        pads_first = self.padding != "timm"
        if pads_first:
            x = pad_to_multiple(x, *self.size)
        if shift_h or shift_w:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
        if not pads_first:
            x = pad_to_multiple(x, *self.size)
        return v1.window_partition(x, self.size).view(-1, self.size[0] * self.size[1], x.shape[-1])

    def join(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undoes `cut`: (B * num_windows, N, C) -> (B, H, W, C)."""
        shift_h, shift_w = self._shift(height, width)
        padded_h, padded_w = self.padded(height, width)
        x = v1.window_reverse(x.view(-1, *self.size, x.shape[-1]), self.size, padded_h, padded_w)
        if self.padding == "timm":
            x = _crop(x, height, width)
        if shift_h or shift_w:
            x = torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2))
        return _crop(x, height, width)

    def mask(self, height: int, width: int, like: Tensor) -> Tensor | None:
        """0 for neighbours and FAR for others, (num_windows, N, N); None where nothing is shifted.

        Args:
            height, width: of what is cut, in tokens.
            like: the mask is of its type, and where it is.
        """
        shift = self._shift(height, width)
        if not any(shift):
            return None
        sides = zip(self.padded(height, width), self.size, shift, strict=True)
        rows, columns = (_regions(side, window, moved, like.device) for side, window, moved in sides)
        regions = (3 * rows[:, None] + columns)[None, :, :, None]
        windows = v1.window_partition(regions, self.size).view(-1, 1, self.size[0] * self.size[1])
        return (windows != windows.transpose(1, 2)).to(like.dtype) * FAR

    def padded(self, height: int, width: int) -> Pair:
        """The size of (height, width) tokens that are filled up to whole windows."""
        return height + -height % self.size[0], width + -width % self.size[1]

    def _shift(self, height: int, width: int) -> Pair:
        return SHIFTS[self.padding](self, height, width)


def _regions(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(side,): 0 where tokens stayed together in the shift, 1 in the last window, 2 for those that came around."""
    places = torch.arange(side, device=device)
    return (places >= side - window).long() + (places >= side - shift).long()


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    fits = _known(height, width) and x.shape[1:3] == (height, width)
    return x if fits else x[:, :height, :width, :].contiguous()


def pad_to_multiple(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pads (B, H, W, C) below and right; a tensor that fits is left alone, and so is the graph."""
    pad_h, pad_w = -x.shape[1] % height, -x.shape[2] % width
    fits = _known(pad_h, pad_w) and not (pad_h or pad_w)
    return x if fits else F.pad(x, (0, 0, 0, pad_w, 0, pad_h))


def _known(*sides: Any) -> bool:
    """Whether sides are numbers, and not symbols of a trace for any size: what fits the example must serve all."""
    return all(isinstance(side, int) for side in sides)


class PadsFirst:
    """Replaces what timm's blocks of V1 and V2 do around their attention. `padding` is a key of SHIFTS."""

    padding: str
    attn: Any
    input_resolution: Any
    norm1: Any
    attn_mask: Tensor | None
    dynamic_mask: bool

    def _attn(self, x: Tensor) -> Tensor:
        windows, (_, height, width, _) = Windows.of(self), x.shape
        mask = windows.mask(height, width, x) if self.dynamic_mask else self.attn_mask
        return windows.join(self.attn(windows.cut(x), mask), height, width)

    def get_attn_mask(self, x: Tensor | None = None, device: Any = None, dtype: Any = None) -> Tensor | None:
        """The mask at the size that the block was built for; timm's blocks call it then."""
        height, width = self.input_resolution
        return Windows.of(self).mask(height, width, self.norm1.weight.detach())


class PadsFirstBlock(PadsFirst, v1.SwinTransformerBlock):
    """A Swin V1 block."""


class PadsFirstV2Block(PadsFirst, v2.SwinTransformerV2Block):
    """A Swin V2 block."""


PADS_FIRST = {v1.SwinTransformerBlock: PadsFirstBlock, v2.SwinTransformerV2Block: PadsFirstV2Block}


def set_padding(model: nn.Module, padding: str) -> None:
    """Makes the blocks of a Swin fill up incomplete windows, and images, as another library does, in place.

    Args:
        model: built with always_partition, but for the libraries of SHRINK.
        padding: a key of SHIFTS.

    Raises:
        ValueError: the library is not known.
    """
    if padding not in SHIFTS:
        raise ValueError(f"padding={padding!r} is not one of {', '.join(SHIFTS)}")
    if padding == "timm":
        return
    block: Any
    for block in list(model.modules()):
        if type(block) in PADS_FIRST:
            # The class alone differs: what timm built stays, with its parameters and buffers
            block.__class__, block.padding = PADS_FIRST[type(block)], padding
            block._init_buffers()
        elif isinstance(block, PatchEmbed):
            block.dynamic_img_pad = padding != "torchvision"  # which leaves out the rows that make no patch
            if not block.strict_img_size:
                block.img_size = None  # else timm asserts that there are no such rows
