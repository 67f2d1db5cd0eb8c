"""The processes that train together: torchrun's, or this one alone.

Alone it is a group of one, so the trainer has one code path. Collectives go over gloo on a CPU and
over NCCL on GPUs (gloo beside it for tensors in host memory).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class TrainingError(RuntimeError):
    """A run that cannot go on: its loss is no number, or a checkpoint cannot be written. All ranks
    raise it together."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among all of them."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return [float(value) for value in together]

    def gather(self, value: object) -> list[object]:
        """Every rank's value."""
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


@contextmanager
def joined(threads: int = 0) -> Iterator[Ranks]:
    """Joins the group that torchrun set up, or makes one of this process alone."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    if threads and not cuda:
        torch.set_num_threads(threads)
    store = None if "WORLD_SIZE" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cuda" if cuda else "cpu", (world,))
        yield Ranks(rank, world, device or torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()
