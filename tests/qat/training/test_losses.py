"""Losses against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from qswin.qat.training.losses import block_loss, dice_loss, distillation_loss, task_loss


@pytest.mark.parametrize("shape", [(6, 9), (2, 4, 3, 5)])
def test_distillation_is_the_divergence_from_the_teacher(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    p, q = (F.softmax(logits.double() / 2, dim=1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_block_loss_is_a_share_of_the_teachers_square():
    ours, theirs = [torch.randn(2, 3), torch.randn(4)], [torch.randn(2, 3), torch.randn(4)]
    expected = (
        sum(((a - b).double() ** 2).mean() / (b.double() ** 2).mean() for a, b in zip(ours, theirs, strict=True)) / 2
    )
    assert block_loss(ours, theirs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dice_loss_is_counted_by_hand():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    masks[0, 0, :2] = 255
    scores = []
    for index in range(3):
        both = predicted = true = 0.0
        for image in range(2):
            for pixel, label in zip(
                logits[image].double().softmax(0).flatten(1).T, masks[image].flatten(), strict=True
            ):
                if label != 255:
                    both += pixel[index] * (label == index)
                    predicted += pixel[index] ** 2
                    true += label == index
        scores.append((2 * both + 1e-5) / (predicted + true + 1e-5))
    assert dice_loss(logits, masks).item() == pytest.approx(1 - (sum(scores) / 3).item(), rel=1e-5)


def test_a_right_mask_has_no_loss_and_a_wrong_one_has():
    masks = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    sure = 50.0 * F.one_hot(masks.long(), 3).movedim(-1, 1)
    assert task_loss("segmentation", sure, masks, 0.0).item() == pytest.approx(0, abs=1e-5)
    assert task_loss("segmentation", -sure, masks, 0.0).item() > 1


def test_what_is_not_counted_has_no_gradient():
    logits, masks = torch.randn(1, 3, 2, 2, requires_grad=True), torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    task_loss("segmentation", logits, masks, 0.0).backward()
    assert logits.grad is not None
    assert (logits.grad[..., 1, 1] == 0).all() and (logits.grad[..., 0, :] != 0).all()
