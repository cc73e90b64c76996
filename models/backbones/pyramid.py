"""What torchvision's detectors (torchvision.models.detection) need of a backbone."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from qswin.models.backbones.backbone import Backbone


class PyramidBackbone(nn.Module):
    """A backbone under a feature pyramid network (Lin et al., "Feature Pyramid Networks", CVPR 2017).

    (B, 3, H, W) -> {"stage1": (B, out_channels, H / stride, W / stride), ..., "pool": of half the last one's size}. It
    is a detector's `backbone`, to be quantized alone: the detector's heads stay in float.

    Args:
        out_channels: of every feature map.
    """

    def __init__(self, body: Backbone, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(list(body.channels.values()), out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict(self.body(x)))
