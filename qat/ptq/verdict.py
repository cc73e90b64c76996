"""A verdict on a quantized model: how far it is from the float one, on images that it was not calibrated on."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from qswin.qat.ptq.prediction import Outputs, agreement, divergence, named_outputs
from qswin.qat.quant.quantizers import TensorQuantizer, quantizers
from qswin.qat.quant.rewrite import disable, enable

VERDICT_IMAGES = 64  # drawn beside those that are calibrated on
KL_LIMIT = 0.05  # a mean KL above it, or
AGREEMENT_LIMIT = 90.0  # an agreement in per cent below it, is a bad verdict
BLAMED = 3  # kinds of sites that a bad verdict names
HELPS = 0.9  # at most this share of the KL is left without a kind that is to blame


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far a quantized model is from the float one.

    Args:
        images: how many it was measured on.
        agreement: of a classifier, how often both give the same class; of masks, the mean Dice of both; of a backbone,
            how many values of its feature maps are near each other; in per cent.
        kl: mean KL(float || quantized) of what they predict (qat/ptq/prediction.py), over images, pixels or values.
        blame: {kind of site: the KL without it}, the worst first; of a bad verdict only.
    """

    images: int
    agreement: float
    kl: float
    blame: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether the model is near enough to the float one to be used; NaN is not."""
        return self.kl <= KL_LIMIT and self.agreement >= AGREEMENT_LIMIT

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "good": self.good}

    def __str__(self) -> str:
        """One line; of a bad verdict with the sites to blame."""
        line = f"{self.agreement:.1f} % agreement with float, mean KL {self.kl:.4g}, on {self.images} other images"
        if self.good:
            return line
        blame = ", ".join(f"{kind} (without it {kl:.3g})" for kind, kl in self.blame.items())
        limits = f"a KL of {KL_LIMIT} and {AGREEMENT_LIMIT:.0f} % are wanted"
        return f"{line}; {limits}" + (f"; to blame: {blame}" if blame else "")


def tell(verdict: Verdict, remedy: str, strict: bool) -> None:
    """Logs a verdict; a bad one is a warning, or, where `strict`, a ValueError, with what mends it."""
    if verdict.good:
        logging.info("%s", verdict)
    elif strict:
        raise ValueError(f"the quantized model is far from the float one: {verdict}; {remedy}")
    else:
        logging.warning("the quantized model is far from the float one: %s; %s", verdict, remedy)


class Comparison:
    """A calibrated model against itself without quantization, or against another float model.

    Args:
        batches: (N, 3, H, W) each, on the model's device; at least one.
        reference: a float model; None stands for the model with its quantizers off.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], reference: nn.Module | None = None) -> None:
        self.model, self.batches = model, batches
        disable(model, quiet=True)
        self.reference = [_outputs(reference or model, batch) for batch in batches]
        enable(model)

    def verdict(self) -> Verdict:
        """Measured with all quantizers on, with the kinds of sites to blame where it is bad."""
        found = self.measure()
        return found if found.good else dataclasses.replace(found, blame=self.blame(found.kl))

    def measure(self) -> Verdict:
        """Measured with the quantizers as they are."""
        outputs = [_outputs(self.model, batch) for batch in self.batches]
        pairs = zip(outputs, self.reference, strict=True)
        kl = torch.cat([divergence(*pair).flatten() for pair in pairs]).mean()
        return Verdict(sum(map(len, self.batches)), agreement(outputs, self.reference), float(kl))

    def without(self, group: Sequence[TensorQuantizer]) -> Verdict:
        """Measured without some of the quantizers."""
        for quantizer in group:
            quantizer.disable(quiet=True)
        found = self.measure()
        for quantizer in group:
            quantizer.enable()
        return found

    def blame(self, everything: float) -> dict[str, float]:
        """{kind of site: the KL without it} of the few that cost the most; `everything` is the KL with all."""
        found = {kind: self.without(group).kl for kind, group in kinds(self.model).items()}
        worst = sorted(found.items(), key=lambda item: item[1])[:BLAMED]
        return {kind: kl for kind, kl in worst if not kl > HELPS * everything}


def kinds(model: nn.Module) -> dict[str, list[TensorQuantizer]]:
    """The quantizers by what recipes call their sites in all blocks: qkv, fc2, attn.probs, add1, ..."""
    groups: dict[str, list[TensorQuantizer]] = defaultdict(list)
    for quantizer in quantizers(model):
        parts = quantizer.recipe_site.split(".")
        if parts[-1] in ("shortcut", "branch"):
            parts.pop()
        kind = ".".join(parts[-2:]) if parts[-1] in ("q", "k", "v", "probs") else parts[-1]
        groups[kind].append(quantizer)
    return dict(groups)


@torch.inference_mode()
def _outputs(model: nn.Module, batch: Tensor) -> Outputs:
    training = model.training
    outputs = named_outputs(model.eval()(batch))
    model.train(training)
    return {name: each.double() for name, each in outputs.items()}
