"""The ranks that train together: torchrun's processes, or this process alone.

A single process is a group of one, so the trainer has one code path. Collectives use gloo on a CPU
and NCCL on GPUs (gloo beside it for tensors in host memory).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class TrainingError(RuntimeError):
    """The run cannot continue: its loss is NaN or infinite, or a checkpoint cannot be written. All
    ranks raise it together."""


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """This process's rank among all of them."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_reduce(self, value: float) -> float:
        """The sum over the ranks, in float64."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def all_gather(self, value: object) -> list[object]:
        """Every rank's value."""
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(threads: int = 0) -> Iterator[DistributedContext]:
    """Joins torchrun's process group, or creates one of this process alone."""
    cuda = torch.cuda.is_available()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    if threads and not cuda:
        torch.set_num_threads(threads)
    store = None if "WORLD_SIZE" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cuda" if cuda else "cpu", (world_size,))
        yield DistributedContext(rank, world_size, device or torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()
