"""Training losses as pure functions. The class dimension of logits is second: (N, classes) or (N, classes, H, W)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qswin.trt.evaluation.segmentation import IGNORED


def task_loss(task: str, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy, with the Dice loss beside it where whole masks are the target.

    Args:
        task: classification or segmentation.
        target: (N,) class indices, (N, classes) probabilities, or (N, H, W) masks.
        smoothing: of the cross-entropy's labels.
    """
    if task == "classification":
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    # The weights are those of the published training code of Swin-Unet.
    entropy = F.cross_entropy(logits, target.long(), ignore_index=IGNORED, label_smoothing=smoothing)
    return 0.4 * entropy + 0.6 * dice_loss(logits, target)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - mean over classes of 2 sum(p t) / (sum(p^2) + sum(t^2)), over all pixels of a batch.

    Milletari et al., "V-Net", 3DV 2016, section 3, for each class.

    Args:
        logits: (N, classes, H, W).
        masks: (N, H, W) class indices; 255 is not counted.
    """
    classes, known = logits.shape[1], (masks != IGNORED).unsqueeze(1)
    indices = torch.where(known.squeeze(1), masks.long(), 0)
    true = F.one_hot(indices, classes).movedim(-1, 1) * known
    probabilities = logits.softmax(dim=1) * known
    both = (probabilities * true).sum((0, 2, 3))
    total = probabilities.square().sum((0, 2, 3)) + true.sum((0, 2, 3))
    return 1 - ((2 * both + 1e-5) / (total + 1e-5)).mean()


def block_loss(outputs: Sequence[Tensor], teacher_outputs: Sequence[Tensor]) -> Tensor:
    """Squared error of each block's output, as a share of the teacher's mean square; the mean over blocks.

    Args:
        outputs, teacher_outputs: one tensor a block, of any shape.
    """
    shares = [
        F.mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean()
        for ours, theirs in zip(outputs, teacher_outputs, strict=True)
    ]
    return torch.stack(shares).mean()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, the mean over images, or over pixels.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        logits, teacher_logits: (N, classes) or (N, classes, H, W).
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()
