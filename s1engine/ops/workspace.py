"""Memory that the operations of a step write their results into, step after step."""

import torch
from torch import Tensor


class Workspace:
    """Memory for results, one buffer for each name, as large as was ever needed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self.generation = 0
        """Grows whenever a buffer moves: what was recorded before is void."""

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] of undefined content."""
        size = rows * width * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = torch.empty(size, dtype=torch.uint8)
            self._buffers[name] = buffer
            self.generation += 1
        return buffer[:size].view(dtype).view(rows, width)
