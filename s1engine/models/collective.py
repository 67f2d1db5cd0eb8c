"""How the ranks of a model add up and gather what each has computed of it.

Ranks on the CPU do so in memory that all have mapped (csrc/cpu/collective.hpp), ranks on CUDA
devices through NCCL. Every rank must make the same calls in the same order.
"""

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from s1engine._core import cpu
from s1engine.models.shard import Shard
from s1engine.ops.layouts import DTYPES
from s1engine.ops.workspace import Workspace

dist: Any = torch.distributed  # whose types leave out what process groups can
TIMEOUT = timedelta(seconds=120)  # for the slowest rank to come to the same call

CollectiveError = cpu.CollectiveError
"""Another rank has not come: it has died, or it hangs."""


class Collective(Protocol):
    """Sums and gathers among the ranks on this machine."""

    shard: Shard
    """This rank, and how many there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """x, equally shaped on all ranks, becomes the sum over them, in place."""

    def all_reduce_residual(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """residual += the sum over ranks of x, and None; or that sum, still to be added."""

    def gather(self, x: Tensor) -> Tensor:
        """x [B, N], equally shaped on all ranks, side by side: [B, size * N], on rank 0 alone; the
        others get their own back. Valid until the next call."""

    def abort(self) -> None:
        """Lets a call that waits for a lost rank fail now; may come from another thread."""


class SharedCollective:
    """A Collective of ranks whose tensors are in main memory. Its calls can be recorded, as those
    of CpuOps.

    Args:
        memory: ``memory_bytes`` of them, the same for all ranks, zeros at first.
    """

    def __init__(self, shard: Shard, memory: Tensor) -> None:
        assert memory.nbytes >= self.memory_bytes(shard.size)
        self.shard = shard
        self.workspace = Workspace()
        self._memory = memory  # kept
        self._core = cpu.Collective(memory.data_ptr(), shard.rank, shard.size)

    @staticmethod
    def memory_bytes(size: int) -> int:
        """What so many ranks need."""
        return cpu.Collective.memory_bytes(size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collective."""
        self._sum(x, x, add=False)
        return x

    def all_reduce_residual(self, x: Tensor, residual: Tensor) -> None:
        """See Collective."""
        assert residual.shape == x.shape and residual.dtype is x.dtype
        self._sum(x, residual, add=True)

    def _sum(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        assert x.is_contiguous() and out.is_contiguous()
        self._core.all_reduce(DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), x.numel(), add)

    def gather(self, x: Tensor) -> Tensor:
        """See Collective."""
        assert x.is_contiguous()
        rows, width = x.shape
        if self.shard.rank == 0:
            out = self.workspace.get("gather", rows, self.shard.size * width, x.dtype)
        else:
            out = x
        self._core.gather(x.data_ptr(), out.data_ptr(), rows, width * x.dtype.itemsize)
        return out

    def abort(self) -> None:
        """See Collective."""
        self._core.abort()


class NcclCollective:
    """A Collective of ranks that have a CUDA device each; returns when all have connected.

    Owns one process group. It belongs to this object: the process's default group, which may be
    somebody else's, is not touched.

    Args:
        store: path of a file, empty at first, that all ranks may write.
    """

    def __init__(self, shard: Shard, store: str) -> None:
        self.shard = shard
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        rendezvous = dist.FileStore(store, shard.size)
        self._group = dist.ProcessGroupNCCL(rendezvous, shard.rank, shard.size, options)
        self.all_reduce(torch.zeros(1, device="cuda"))  # connects

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Collective."""
        try:
            self._group.allreduce([x]).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return x

    def all_reduce_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        """See Collective."""
        return self.all_reduce(x)

    def gather(self, x: Tensor) -> Tensor:
        """See Collective."""
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
        """See Collective."""
        self._group.abort()
