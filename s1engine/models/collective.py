"""How the ranks of a model add up and gather what each has computed of it.

Owns one process group of torch.distributed, gloo on the CPU and NCCL on CUDA devices. The group
belongs to this object: the process's default group, which may be somebody else's, is not touched.
Every rank must make the same calls in the same order.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from s1engine.models.shard import Shard

dist: Any = torch.distributed  # whose types leave out what process groups can
TIMEOUT = timedelta(seconds=120)  # for the slowest rank to come to the same call


class CollectiveError(RuntimeError):
    """Another rank has not come: it has died, or it hangs."""


class Collective:
    """Sums and gathers among the ranks on this machine; returns when all have connected.

    Args:
        shard: this rank, and how many there are.
        device: ``cpu``, or ``cuda``, which means the process's current device.
        store: path of a file, empty at first, that all ranks may write.
    """

    def __init__(self, shard: Shard, device: str, store: str) -> None:
        self.shard = shard
        rendezvous = dist.FileStore(store, shard.size)
        self._group = (_gloo if device == "cpu" else _nccl)(rendezvous, shard)
        self.sum(torch.zeros(1, device=device))  # NCCL connects with the first call

    def sum(self, x: Tensor) -> Tensor:
        """x, equally shaped on all ranks, becomes the sum over them, in place."""
        try:
            self._group.allreduce([x]).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x [B, N], equally shaped on all ranks, side by side: [B, size * N], on rank 0 alone; the
        others get their own back."""
        if x.numel() == 0:
            return x.new_empty(x.shape[0], x.shape[1] * self.shard.size)
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.shard.size if self.shard.rank == 0 else 0)]
        try:
            self._group.gather([parts] if parts else [], [x], options).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return torch.cat(parts, dim=1) if parts else x

    def abort(self) -> None:
        """Lets a call that waits for a lost rank fail now; may come from another thread."""
        self._group.abort()


def _gloo(store: Any, shard: Shard) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._threads = 1
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(store: Any, shard: Shard) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
