"""Probes: KL against torch's, and which quantizers are switched together."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qswin.calib.data.batches import Batch
from qswin.qat.mixed_precision.probe import Divergence, group_quantizers
from qswin.qat.quant.quantizers import quantizers


@pytest.mark.parametrize("shape", [(6, 9), (2, 4, 3, 5)])
def test_divergence_is_torchs(shape):
    rng = np.random.default_rng(0)
    floating, ours = rng.standard_normal((2, *shape)) * 3
    metric = Divergence([floating[:1], floating[1:]])
    for part in (slice(0, 1), slice(1, None)):
        metric.update(ours[part], Batch(ours[part], ours[part], []))
    p, q = (F.log_softmax(torch.from_numpy(x), dim=1) for x in (floating, ours))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(1).mean().item()
    assert metric.result()["kl"] == pytest.approx(expected, rel=1e-6)


def test_layers_hold_all_of_a_matmul(probe):
    layers = group_quantizers(probe.model, "layer")
    matmul = {q.site for q in layers["layers.0.blocks.0.attn.qk"]}
    assert matmul == {"layers.0.blocks.0.attn.q", "layers.0.blocks.0.attn.k"}
    assert sum(map(len, layers.values())) == len(list(quantizers(probe.model)))
