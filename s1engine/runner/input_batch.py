"""The arrays of one step, shared with the scheduler without copying.

Host tensors are allocated once; the C++ scheduler writes into them through their numpy views, and
``inputs`` shows the written part. On a GPU the host side is pinned and copied asynchronously.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import AttentionMetadata

_FIELDS: dict[str, torch.dtype] = {
    "input_ids": torch.int32,
    "positions": torch.int32,
    "slot_mapping": torch.int64,
    "cu_seqlens_q": torch.int32,
    "context_lens": torch.int32,
    "block_table": torch.int32,
    "sample_tokens": torch.int32,
    "sample_seats": torch.int32,
    "sample_positions": torch.int64,
    "sample_banned": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Host view of the rows that sample in this step; n of them."""

    seats: np.ndarray  # [n] int32
    positions: Tensor  # [n] int64 on the device, position of the token to sample
    banned: np.ndarray  # [n] uint8, 1: thinking triggers must not be sampled


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that one step reads. On the CPU these are views of the buffers, valid for every later
    step of the same sizes."""

    input_ids: Tensor  # [T] int32
    attention: AttentionMetadata
    sample_tokens: Tensor  # [n] int32, indices into T of the tokens whose logits are sampled
    rows: SampleRows


class InputBatch:
    """Buffers for up to ``max_tokens`` tokens in ``max_rows`` rows of ``max_blocks`` blocks."""

    def __init__(self, *, max_tokens: int, max_rows: int, max_blocks: int, device: str) -> None:
        sizes = {"block_table": (max_rows, max_blocks), "cu_seqlens_q": (max_rows + 1,)}
        sizes |= dict.fromkeys(("input_ids", "positions", "slot_mapping"), (max_tokens,))
        self.device = device
        self._host = {
            name: torch.zeros(sizes.get(name, (max_rows,)), dtype=dtype, pin_memory=device != "cpu")
            for name, dtype in _FIELDS.items()
        }
        views = {name: tensor.numpy() for name, tensor in self._host.items()}
        self.block_table = self._host["block_table"]  # on the host, [max_rows, max_blocks] int32
        self._seats = views["sample_seats"]
        self._banned = views["sample_banned"]
        self.core = _core.ScheduledBatch(
            views, max_tokens=max_tokens, max_rows=max_rows, max_blocks=max_blocks
        )

        self._sizes: tuple[int, ...] = ()
        self._inputs: StepInputs | None = None

    @property
    def seats(self) -> np.ndarray:
        """Of the rows that sample in the planned step, [n] int32; a view."""
        return self._seats[: self.core.num_samples]

    def inputs(self) -> StepInputs:
        """What the scheduler has written. Decoding goes on in the same sizes for many steps, so the
        views are kept; a GPU needs a new copy each time."""
        core = self.core
        sizes = (core.num_tokens, core.num_rows, core.num_samples, core.max_seqlen_q)
        if self._inputs is None or sizes != self._sizes or self.device != "cpu":
            self._sizes, self._inputs = sizes, self._make_inputs(*sizes)
        return self._inputs

    def _make_inputs(self, tokens: int, rows: int, samples: int, max_seqlen_q: int) -> StepInputs:
        return StepInputs(
            input_ids=self._on_device("input_ids", tokens),
            attention=AttentionMetadata(
                positions=self._on_device("positions", tokens),
                slot_mapping=self._on_device("slot_mapping", tokens),
                cu_seqlens_q=self._on_device("cu_seqlens_q", rows + 1),
                context_lens=self._on_device("context_lens", rows),
                block_table=self._on_device("block_table", rows),
                max_seqlen_q=max_seqlen_q,
            ),
            sample_tokens=self._on_device("sample_tokens", samples),
            rows=SampleRows(
                seats=self._seats[:samples],
                positions=self._on_device("sample_positions", samples),
                banned=self._banned[:samples],
            ),
        )

    def _on_device(self, name: str, size: int) -> Tensor:
        tensor = self._host[name][:size]
        return tensor if self.device == "cpu" else tensor.to(self.device, non_blocking=True)
