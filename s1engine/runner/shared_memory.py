"""Memory that the processes of one model share."""

import mmap
import os

import torch
from torch import Tensor

from s1engine.errors import RequestError


class SharedMemory:
    """A file in memory, freed when the last process that has it open ends.

    Args:
        fd: the file of the process that started this one; None: a new file.
    """

    def __init__(self, fd: int | None = None) -> None:
        if not hasattr(os, "memfd_create"):
            raise RequestError(
                "tensor_parallel_size above 1 needs Linux", param="tensor_parallel_size"
            )
        self.fd = os.memfd_create("s1engine ranks") if fd is None else fd
        self._size = 0

    def allocate(self, nbytes: int) -> Tensor:
        """The next ``nbytes`` bytes, zeroed. All processes must allocate the same sizes in the same
        order."""
        begin = self._size
        self._size += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        # Grows the file and never cuts it; the last page alone is allocated before its use.
        os.posix_fallocate(self.fd, self._size - 1, 1)
        return torch.frombuffer(mmap.mmap(self.fd, nbytes, offset=begin), dtype=torch.uint8)

    def close(self) -> None:
        """Closes the file. What was allocated stays mapped."""
        os.close(self.fd)
