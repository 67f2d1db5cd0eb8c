"""Host memory and its copy on the device, both at fixed addresses.

A step is written on the host and read on the device, which may be far behind: the copy is made in
the order of the stream, so the host must not write again before ``wait``.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes
Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of arrays in one allocation, in their order."""


class StagingBuffer:
    """``host`` and ``device``, [n] uint8; on the CPU they are the same memory.

    Args:
        host: [n] uint8, on the CPU; pinned, unless other processes share it.
        device: where the copy is.
    """

    def __init__(self, host: Tensor, device: str) -> None:
        self.host = host
        self.device = host if device == "cpu" else torch.zeros_like(host, device=device)
        self._copied = None if device == "cpu" else torch.cuda.Event()

    def upload(self, nbytes: int) -> None:
        """Copies the first ``nbytes`` bytes, in stream order. Waits for nothing."""
        if self._copied is not None:
            self.device[:nbytes].copy_(self.host[:nbytes], non_blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Returns when the device has made the last copy."""
        if self._copied is not None:
            self._copied.synchronize()


def places_of(fields: Fields) -> dict[str, slice]:
    """The bytes of each field, each aligned to ALIGNMENT; the last ends the allocation."""
    places, begin = {}, 0
    for name, (shape, dtype) in fields.items():
        begin = -(-begin // ALIGNMENT) * ALIGNMENT
        places[name] = slice(begin, begin + prod(shape) * dtype.itemsize)
        begin = places[name].stop
    return places


def views_of(memory: Tensor, fields: Fields) -> dict[str, Tensor]:
    """The fields in ``memory`` [n] uint8."""
    places = places_of(fields)
    return {
        name: memory[places[name]].view(dtype).view(shape)
        for name, (shape, dtype) in fields.items()
    }
