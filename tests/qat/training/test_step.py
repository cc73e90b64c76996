"""One step of the optimizer, against computations by hand."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qswin.qat.distributed import Ranks
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.schema import TrainConfig
from qswin.qat.training.images import TrainBatch
from qswin.qat.training.objective import Objective
from qswin.qat.training.step import TrainStep

ONE = Ranks(0, 1, torch.device("cpu"))
CLASSES = 5


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, CLASSES))


def make_step(model: nn.Module, total: int = 10, ranks: Ranks = ONE, **options) -> TrainStep:
    settings = TrainConfig(lr=0.01, **options)
    return TrainStep(model, Objective(model, None, "classification", CLASSES, settings), settings, total, 0, ranks)


def batches(sizes: list[int], side: int = 4) -> list[TrainBatch]:
    """One stream of images, cut into batches."""
    count, generator = sum(sizes), torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return [
        TrainBatch(*parts)
        for parts in zip(*(t.split(sizes) for t in (images, labels, torch.arange(count))), strict=True)
    ]


def run(step: TrainStep, sizes: list[int]) -> list[float]:
    stream = iter(batches(sizes))
    return [step(stream) for _ in range(len(sizes) // step.options.grad_accum_steps)]


def test_two_accumulated_batches_are_one_of_twice_the_size():
    models = linear(), linear()
    once = run(make_step(models[0]), [8, 8, 8])
    twice = run(make_step(models[1], grad_accum_steps=2), [4] * 6)
    assert twice == pytest.approx(once, rel=1e-5)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-6)


def test_the_moving_average_is_that_of_the_weights():
    model, decay = linear(), 0.9
    step = make_step(model, ema_decay=decay)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in batches([4, 4, 4]):
        step(iter([batch]))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in model.state_dict().items()}
    torch.testing.assert_close(step.trained().state_dict(), expected)
    assert not torch.allclose(expected["3.weight"], model.state_dict()["3.weight"])


@pytest.mark.parametrize("largest", [None, 1e-3, 1e3])
def test_the_gradients_norm_is_clipped(largest):
    model, seen = linear(), []
    (batch,) = batches([4])
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(batch.images), batch.labels).backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    if largest is not None:
        expected = expected * min(1.0, largest / expected.norm().item())
    step = make_step(model, clip_grad=largest)
    step.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.flatten().clone() for p in model.parameters()))
    step(iter([batch]))
    torch.testing.assert_close(torch.cat(seen), expected, rtol=1e-4, atol=1e-8)


def test_smoothed_labels_give_all_classes_a_share():
    model, smoothing = linear(), 0.2
    (batch,) = batches([6])
    with torch.no_grad():
        logs = model(batch.images).log_softmax(dim=1)
    target = torch.full((6, CLASSES), smoothing / CLASSES)
    target[range(6), batch.labels] += 1 - smoothing
    expected = -(target * logs).sum(dim=1).mean().item()
    assert run(make_step(model, label_smoothing=smoothing), [6]) == pytest.approx([expected], rel=1e-6)


def test_ranges_are_frozen_from_a_share_of_the_steps(quantized, images):
    for quantizer in quantizers(quantized):
        quantizer.learn_range()
    step = make_step(quantized.train(), total=4, learn_ranges=True, range_lr=0.05, freeze_ranges_at=0.5)
    batch = TrainBatch(images, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    moved, trained = [], []
    for _ in range(4):
        before = [q.amax.detach().clone() for q in quantizers(quantized)], quantized.head.fc.weight.detach().clone()
        step(iter([batch]))
        moved.append(any(not torch.equal(a, q.amax) for a, q in zip(before[0], quantizers(quantized), strict=True)))
        trained.append(not torch.equal(before[1], quantized.head.fc.weight))
    assert moved == [True, True, False, False] and trained == [True] * 4


def ddp() -> None:
    """In each of two processes: counts DDP's reductions, and compares with one process over all the images."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from qswin.qat.distributed import process_group

    with process_group("cpu") as ranks:
        model, alone, reductions = linear(), linear(), []
        step = make_step(model, ranks=ranks, grad_accum_steps=2)
        step.network.register_comm_hook(
            None, lambda state, bucket: reductions.append(bucket) or allreduce_hook(state, bucket)
        )
        parts = batches([4] * 12)
        mine = iter(parts[ranks.rank :: 2])
        for _ in range(3):
            step(mine)
        run(make_step(alone), [16] * 3)
        torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)
        assert len(reductions) == 3, len(reductions)  # one bucket a step


@pytest.mark.slow
def test_ranks_reduce_gradients_once_a_step():
    root = Path(__file__).resolve().parents[3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    script = "from tests.qat.training.test_step import ddp; ddp()"
    subprocess.run([*launch, "--no-python", sys.executable, "-c", script], cwd=root, check=True)
