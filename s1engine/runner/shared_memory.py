"""Memory that the processes of one model have in common, part by part."""

import mmap
import os

import torch
from torch import Tensor

from s1engine.errors import RequestError


class SharedMemory:
    """A file in memory that is gone when the last process that has it open is.

    Args:
        fd: the file of the process that started this one; None: a new one.
    """

    def __init__(self, fd: int | None = None) -> None:
        if not hasattr(os, "memfd_create"):
            raise RequestError(
                "tensor_parallel_size above 1 needs Linux", param="tensor_parallel_size"
            )
        self.fd = os.memfd_create("s1engine ranks") if fd is None else fd
        self._taken = 0

    def take(self, size: int) -> Tensor:
        """The next ``size`` bytes, zeros at first. All processes take the same parts in order."""
        begin = self._taken
        self._taken += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self.fd, begin, self._taken - begin)  # grows, never cuts off
        return torch.frombuffer(mmap.mmap(self.fd, size, offset=begin), dtype=torch.uint8)

    def close(self) -> None:
        """No further part will be taken; those that are taken stay."""
        os.close(self.fd)
