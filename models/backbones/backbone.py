"""A backbone: the stages of a hierarchical transformer as feature maps, for detectors and segmentors."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module):
    """(B, 3, H, W) of any size -> {"stage1": (B, C, H / stride, W / stride), ...}, in order.

    A family's own class says in `stages` how the stages follow each other.

    Args:
        channels: of each stage's feature map.
        strides: in pixels, of each stage's feature map.
        out_features: names of the stages whose feature maps are given.
        feature_norms: each of these has a LayerNorm of its own, as in OpenMMLab and transformers.

    Attributes:
        channels: {name: channels}, of the feature maps that are given.
        strides: {name: pixels}, of the same.

    Raises:
        ValueError: there is no such stage, or none is named.
    """

    num_classes = 0

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], out_features: Sequence[str], feature_norms: bool
    ) -> None:
        super().__init__()
        self.names = [f"stage{index}" for index in range(1, len(channels) + 1)]
        unknown = [name for name in out_features if name not in self.names]
        if unknown or not out_features:
            found = f"{unknown[0]!r} is not among" if unknown else "is empty; choose of"
            raise ValueError(f"out_features: {found} {', '.join(self.names)}")
        self.last = max(map(self.names.index, out_features))
        given = [index for index, name in enumerate(self.names) if name in out_features]
        self.channels = {self.names[index]: channels[index] for index in given}
        self.strides = {self.names[index]: strides[index] for index in given}
        for index in given if feature_norms else ():
            self.add_module(f"norm{index}", nn.LayerNorm(channels[index]))

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each stage, (B, H, W, C), the first first."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for index, tokens in enumerate(self.stages(x)):
            if self.names[index] in self.channels:
                norm: Any = getattr(self, f"norm{index}", None)
                maps[self.names[index]] = (tokens if norm is None else norm(tokens)).permute(0, 3, 1, 2)
            if index == self.last:
                break
        return maps
