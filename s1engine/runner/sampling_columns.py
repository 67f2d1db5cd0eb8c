"""Sampling parameters of a step's rows, in the order of the step.

The host gathers them by ``req_index`` when the rows of a step change, and one asynchronous copy
brings all of them to fixed addresses on the device, so a graph may read them. On the CPU both sides
are the same memory.
"""

import numpy as np
import torch
from torch import Tensor

from s1engine.runner.staging_buffer import StagingBuffer, places_of, views_of

COLUMNS = {
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
        fields = {name: ((max_rows,), dtype) for name, dtype in COLUMNS.items()}
        nbytes = max(place.stop for place in places_of(fields).values())
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
        self._staging = StagingBuffer(host, device)
        self._host = {name: view.numpy() for name, view in views_of(host, fields).items()}
        self._device = views_of(self._staging.device, fields)
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
