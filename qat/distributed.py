"""The process group that torchrun sets up, or one process alone."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The values summed over all ranks; on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Joins torchrun's process group (nccl on GPUs, gloo on CPUs) and leaves it at the end.

    Args:
        device: "auto", "cpu", "cuda" or another torch device; each process takes the GPU of its local rank.

    Raises:
        ValueError: the device is not there.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if chosen == "cuda":
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        target = torch.device(chosen)
        torch.zeros(1, device=target).item()  # which the device meta cannot give
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"device={device}: {reason}; choose device=cpu") from error
    if target.type == "cuda":
        torch.cuda.set_device(target)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions too
    if world > 1:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, target)
    finally:
        if world > 1:
            dist.destroy_process_group()
