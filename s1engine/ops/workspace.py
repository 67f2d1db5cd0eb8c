"""Memory for the results of operations, reused by every step."""

import torch
from torch import Tensor


class Workspace:
    """Buffers by name; each grows to the largest size requested so far."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.generation = 0
        """Increases when a buffer moves, which invalidates recorded steps."""

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], not initialised."""
        size = rows * width * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = torch.empty(size, dtype=torch.uint8)
            self._buffers[name] = buffer
            self.generation += 1
        return buffer[:size].view(dtype).view(rows, width)
