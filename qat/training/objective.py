"""What is minimized: the task's loss, mixed with the distance from the float model where that is asked for."""

import torch
from timm.data import Mixup
from torch import Tensor, nn

from qswin.qat.quant.blocks import BlockOutputs
from qswin.qat.schema import TrainConfig
from qswin.qat.training.losses import block_loss, distillation_loss, task_loss

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective:
    """The loss of a batch.

    Args:
        model: the one that is trained, without wrappers.
        teacher: the float model, or None without distillation. It is made of twins where block outputs are compared.
        classes: how many there are.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, task: str, classes: int, options: TrainConfig
    ) -> None:
        self.teacher, self.task, self.options = teacher, task, options
        by_blocks = teacher is not None and options.distill_blocks_weight > 0
        self.blocks = BlockOutputs(model) if by_blocks else None
        self.teacher_blocks = BlockOutputs(teacher) if by_blocks and teacher is not None else None
        self.mixup = make_mixup(options, classes)

    def __call__(self, network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """The mean loss, a scalar.

        Args:
            network: the model, or a wrapper of it.
            images: (N, 3, H, W) float32.
            target: (N,) class indices or (N, H, W) masks.
        """
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        dtype = AMP[self.options.amp]
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits = network(images)
            with torch.no_grad():
                soft = None if self.teacher is None else self.teacher(images).float()
        smoothing = 0.0 if self.mixup is not None else self.options.label_smoothing  # mixup smooths its targets itself
        loss = task_loss(self.task, logits.float(), target, smoothing)
        if soft is not None:
            weight = self.options.distill_weight
            distance = distillation_loss(logits.float(), soft, self.options.distill_temperature)
            loss = (1 - weight) * loss + weight * distance
        if self.blocks is not None and self.teacher_blocks is not None:
            loss = loss + self.options.distill_blocks_weight * block_loss(
                self.blocks.take(), self.teacher_blocks.take()
            )
        return loss


def make_mixup(options: TrainConfig, classes: int) -> Mixup | None:
    """timm's mixup and CutMix, or None when neither is asked for."""
    augment = options.augment
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=options.label_smoothing, num_classes=classes)
