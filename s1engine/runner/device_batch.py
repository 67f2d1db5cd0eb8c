"""The device batch: rows of a multi-step decode, on the host and on the device.

Owns the buffers of B rows. The scheduler (``begin_multi_step``) and the sampler write the host
side; ``upload`` copies it to the addresses that a captured graph reads. Host tensors are pinned and
allocated once. On the CPU both sides are the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import DeviceBatchTensors, EndTensors
from s1engine.runner.thinking_ends import ThinkingEnds

PHRASE_TOKENS = 256  # room for the phrases and stop tokens of one row, on average


@dataclass(frozen=True, slots=True)
class DeviceBatchFormat:
    """What all rows share: how thinking ends, and where finished rows write."""

    ends: ThinkingEnds
    newlines: np.ndarray  # [V] uint8, does the token's text end in a newline?
    block_size: int
    null_slot: int

    def end_tensors(self, device: str) -> EndTensors | None:
        """The end matcher's tables on ``device``, for all device batches; None without one."""
        tables = self.ends.tables
        if tables is None:
            return None
        arrays = (tables.next_state, tables.depths, tables.token_lens)
        return EndTensors(*(torch.from_numpy(array).to(device) for array in arrays))


class DeviceBatchBuffer:
    """``state`` for ``rows`` rows and up to ``steps`` steps a launch."""

    def __init__(
        self, rows: int, *, steps: int, fmt: DeviceBatchFormat, block_table: Tensor, device: str,
        ends: EndTensors | None = None,
    ) -> None:  # fmt: skip
        def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=device != "cpu")

        self.rows = rows
        self.filtered = False  # does a row use top_k, top_p or min_p?
        self._ints = allocate(len(_core.ROW_FIELDS) + 1, rows, dtype=torch.int32)  # and top_k
        self._longs = allocate(3, rows, dtype=torch.int64)  # slots, sample positions, seeds
        self._floats = allocate(3, rows, dtype=torch.float32)  # temperature, top_p, min_p
        self._phrases = allocate(PHRASE_TOKENS * rows, dtype=torch.int32)
        self.top_k = self._ints[-1].numpy()
        self.seeds = self._longs[2].numpy()
        self.temperature, self.top_p, self.min_p = self._floats.numpy()
        self.core = _core.DeviceBatch(
            fields=self._ints[:-1].numpy(),
            slot_mapping=self._longs[0].numpy(),
            sample_positions=self._longs[1].numpy(),
            phrases=self._phrases.numpy(),
            null_slot=fmt.null_slot,
        )
        hosts = (self._longs, self._ints, self._floats, self._phrases)
        self._hosts = hosts
        on_device = [host if device == "cpu" else torch.zeros_like(host, device=device)
                     for host in hosts]  # fmt: skip
        self._copies = [] if device == "cpu" else list(zip(on_device, hosts, strict=True))
        longs, ints, floats, phrases = on_device
        self.state = DeviceBatchTensors(
            fields=ints[:-1],
            phrases=phrases,
            slot_mapping=longs[0],
            sample_positions=longs[1],
            block_table=block_table,
            temperature=floats[0],
            top_k=ints[-1],
            top_p=floats[1],
            min_p=floats[2],
            seeds=longs[2],
            triggers=torch.tensor(fmt.ends.triggers, dtype=torch.int32, device=device),
            newlines=torch.from_numpy(fmt.newlines).to(device),
            output_tokens=torch.zeros((steps, rows), dtype=torch.int32, device=device),
            step_counter=torch.zeros(1, dtype=torch.int32, device=device),
            block_size=fmt.block_size,
            null_slot=fmt.null_slot,
            ends=ends,
        )
        self.finish_all()

    def finish_all(self) -> None:
        """Marks every row as finished: steps over them write to the null slot only."""
        self._ints.zero_()
        self._ints[_core.ROW_FIELDS.index("finish")] = 1
        self._longs[0] = self.state.null_slot
        self._longs[1:] = 1
        self.upload()

    @property
    def num_bytes(self) -> int:
        """Of the host side."""
        return sum(host.nbytes for host in self._hosts)

    def save(self, memory: Tensor) -> None:
        """Copies the host side into ``memory`` [num_bytes or more] uint8."""
        for part, host in self._parts(memory):
            part.copy_(host)

    def load(self, memory: Tensor) -> None:
        """The reverse of ``save``; on the CPU this is the device's side, too."""
        for part, host in self._parts(memory):
            host.copy_(part)

    def _parts(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        begin = 0
        for host in self._hosts:
            yield memory[begin : begin + host.nbytes].view(host.dtype).view(host.shape), host
            begin += host.nbytes

    def upload(self) -> None:
        """Copies the rows to the device, in stream order."""
        for on_device, host in self._copies:
            on_device.copy_(host, non_blocking=True)
