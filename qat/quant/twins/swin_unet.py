"""Quantized twins of Swin-Unet's own modules (models/swin_unet.py); its blocks are Swin V1's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qswin.models.swin_unet import SkipProjection
from qswin.qat.quant.layers import QuantLinear


class QuantSkipProjection(QuantLinear):
    """Both branches and what they are joined to are quantized by one range, so that an engine concatenates INT8.

    Quantizing the joined tokens changes no value; it is there for the graph, where an engine looks for the pairs right
    before the matmul (ONNX Runtime) and on both sides of the concatenation (TensorRT).
    """

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        tokens = torch.cat((self._input_quantizer(x), self._input_quantizer(skip)), dim=-1)
        return F.linear(self._input_quantizer(tokens), self._weight_quantizer(self.weight), self.bias)


TWINS = {SkipProjection: QuantSkipProjection}
