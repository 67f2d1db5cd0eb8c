"""Sampling parameters of a step's rows, in the order of the step.

The host gathers them by ``req_index`` when the rows of a step change, and one asynchronous copy
brings all of them to fixed addresses on the device, so a graph may read them. On the CPU both sides
are the same memory.
"""

import numpy as np
import torch
from torch import Tensor

from s1engine.runner.staging_buffer import StagingBuffer

COLUMNS = {  # the widest first, so that each is aligned
    "seeds": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
}


class SamplingColumns:
    """COLUMNS for up to ``max_rows`` rows.

    Attributes:
        num_copies: to the device, so far.
    """

    def __init__(self, max_rows: int, device: str) -> None:
        nbytes = max_rows * sum(dtype.itemsize for dtype in COLUMNS.values())
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
        self._staging = StagingBuffer(host, device)
        self._host = {name: column.numpy() for name, column in _views(self._staging.host, max_rows)}
        self._device = dict(_views(self._staging.device, max_rows))
        self.num_copies = 0

    def write(self, parameters: object, req_indices: np.ndarray) -> None:
        """Gathers the rows ``req_indices`` [n] from arrays that are attributes of ``parameters``.
        Waits for no work but the copy before."""
        self._staging.wait()
        n = len(req_indices)
        for name, column in self._host.items():
            np.take(getattr(parameters, name), req_indices, out=column[:n])
        self._staging.upload(self._staging.host.numel())
        self.num_copies += 1

    def column(self, name: str, num_rows: int) -> Tensor:
        """[num_rows] on the device: a view, valid for every later write."""
        return self._device[name][:num_rows]


def _views(memory: Tensor, max_rows: int) -> list[tuple[str, Tensor]]:
    sizes = [max_rows * dtype.itemsize for dtype in COLUMNS.values()]
    parts = zip(COLUMNS.items(), memory.split(sizes), strict=True)
    return [(name, part.view(dtype)) for (name, dtype), part in parts]
