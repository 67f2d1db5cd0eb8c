"""All-reduce and gather among the ranks that share a model.

Ranks on the CPU use memory that all of them map (csrc/cpu/collective.hpp), ranks on CUDA devices
NCCL. Every rank must make the same calls in the same order.
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
TIMEOUT = timedelta(seconds=120)  # for the slowest rank to reach the same call

CollectiveError = cpu.CollectiveError
"""Another rank has not reached the call: it has died, or it hangs."""


class Collective(Protocol):
    """All-reduce and gather among the ranks on this machine."""

    shard: Shard
    """This rank, and the number of ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """x becomes the sum over ranks, in place. Its shape is the same on all ranks."""

    def all_reduce_residual(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """Adds the sum over ranks of x to residual and returns None; or returns that sum, which the
        caller still has to add."""

    def gather(self, x: Tensor) -> Tensor:
        """On rank 0 the x [B, N] of all ranks side by side, [B, size * N]; on the others their own
        x. Valid until the next call."""

    def all_gather(self, x: Tensor) -> Tensor:
        """The same on every rank."""

    def abort(self) -> None:
        """Makes a call that waits for a lost rank fail now. Any thread may call it."""


class SharedCollective:
    """A Collective of ranks whose tensors are in main memory. Its calls can be recorded, like those
    of CpuOps.

    Args:
        memory: ``memory_bytes`` bytes that all ranks share, zeroed.
    """

    def __init__(self, shard: Shard, memory: Tensor) -> None:
        assert memory.nbytes >= self.memory_bytes(shard.size)
        self.shard = shard
        self.workspace = Workspace()
        self._memory = memory  # keeps it mapped
        self._core = cpu.Collective(memory.data_ptr(), shard.rank, shard.size)

    @staticmethod
    def memory_bytes(size: int) -> int:
        """Shared memory that so many ranks need."""
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
        if self.shard.rank == 0:
            return self.all_gather(x)
        self._gather(x, 0)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Collective."""
        rows, width = x.shape
        out = self.workspace.get("gather", rows, self.shard.size * width, x.dtype)
        self._gather(x, out.data_ptr())
        return out

    def _gather(self, x: Tensor, out: int) -> None:
        assert x.is_contiguous()
        rows, width = x.shape
        self._core.gather(x.data_ptr(), out, rows, width * x.dtype.itemsize)

    def abort(self) -> None:
        """See Collective."""
        self._core.abort()


class NcclCollective:
    """A Collective of ranks with a CUDA device each. The constructor returns when all ranks have
    connected.

    Owns one process group, and does not touch the process's default group, which an embedding
    application may use.

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

    def all_gather(self, x: Tensor) -> Tensor:
        """See Collective."""
        parts = x.new_empty(self.shard.size, *x.shape)
        try:
            self._group._allgather_base(parts, x).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return parts.transpose(0, 1).reshape(x.shape[0], -1)

    def abort(self) -> None:
        """See Collective."""
        self._group.abort()
