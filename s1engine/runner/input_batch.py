"""The arrays of one step, shared with the scheduler without copying.

The runner owns the buffers. All arrays lie in one allocation: the C++ scheduler writes a step into
it through ``core``, and ``inputs`` returns views of the part it has written. On a GPU the host side
is pinned, and one asynchronous copy a step brings it to the same places of one allocation on the
device, so views of a size stay valid and a graph may read them. If worker processes share the
model, the host side lies in shared memory, so the scheduler of rank 0 writes for all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import AttentionMetadata
from s1engine.runner.dummy_batch import dummy_attention_metadata
from s1engine.runner.staging_buffer import StagingBuffer, places_of, views_of

CACHED_VIEWS = 1024  # sizes of steps

_FIELDS: dict[str, torch.dtype] = {
    "input_ids": torch.int32,
    "positions": torch.int32,
    "slot_mapping": torch.int64,
    "cu_seqlens_q": torch.int32,
    "context_lens": torch.int32,
    "sample_tokens": torch.int32,
    "sample_req_indices": torch.int32,
    "sample_positions": torch.int64,
    "sample_banned": torch.uint8,
    "scored_tokens": torch.int32,
    "scored_targets": torch.int64,
    "block_table": torch.int32,  # last and largest: only the rows of a step are copied
}
_PER_TOKEN = ("input_ids", "positions", "slot_mapping", "scored_tokens", "scored_targets")


class StepSizes(NamedTuple):
    """Sizes of one step."""

    num_tokens: int
    num_rows: int
    num_samples: int  # rows of logits
    max_seqlen_q: int  # tokens of the longest row
    num_scored: int = 0  # prompt tokens whose log-probabilities are wanted
    num_decode_rows: int = 0  # at the beginning, of one token each


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Host view of the n rows that sample in this step."""

    req_indices: np.ndarray  # [n] int32
    positions: Tensor  # [n] int64 on the device, position of the token to sample
    banned: np.ndarray  # [n] uint8, ThinkingEnds code or BAN_ENDS: what must not be sampled


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The n prompt tokens that the step scores."""

    tokens: Tensor  # [n] int32, indices into T of the tokens before them
    targets: Tensor  # [n] int64, their ids


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that one step reads: views of the buffers, valid for every later step of the same
    sizes."""

    input_ids: Tensor  # [T] int32
    attention: AttentionMetadata
    sample_tokens: Tensor  # [n] int32, indices into T of the tokens whose logits are sampled
    rows: SampleRows
    scored: ScoredRows | None = None


class InputBatch:
    """Buffers for up to ``max_tokens`` tokens in ``max_rows`` rows of ``max_blocks`` blocks.

    Args:
        max_samples: rows of logits in a step; None: one for each row.
        allocate: returns n bytes of zeroed memory that all ranks share; None: private memory.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        device: str,
        max_samples: int | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_FIELDS, (max_rows,))
        shapes |= {"block_table": (max_rows, max_blocks), "cu_seqlens_q": (max_rows + 1,)}
        shapes |= dict.fromkeys(_PER_TOKEN, (max_tokens,))
        samples = (max_samples or max_rows,)
        shapes |= {name: samples for name in _FIELDS if name.startswith("sample_")}
        self.max_tokens = max_tokens
        if allocate is None:
            allocate = partial(torch.zeros, dtype=torch.uint8, pin_memory=device != "cpu")
        fields = {name: (shapes[name], dtype) for name, dtype in _FIELDS.items()}
        table = places_of(fields)["block_table"]
        self._staging = StagingBuffer(allocate(table.stop), device)
        self._host = views_of(self._staging.host, fields)
        self._device = views_of(self._staging.device, fields)
        self._table_begin = table.start
        self._table_row_bytes = self._host["block_table"].stride(0) * torch.int32.itemsize
        views = {name: tensor.numpy() for name, tensor in self._host.items()}
        self.block_table = self._host["block_table"]  # on the host, [max_rows, max_blocks] int32
        self._req_indices = views["sample_req_indices"]
        self._banned = views["sample_banned"]
        self.core = _core.ScheduledBatch(
            views,
            max_tokens=max_tokens,
            max_rows=max_rows,
            max_blocks=max_blocks,
            max_samples=samples[0],
        )
        self._make_inputs = lru_cache(CACHED_VIEWS)(self._new_inputs)

    @property
    def req_indices(self) -> np.ndarray:
        """Of the rows that sample in the scheduled step, [n] int32; a view."""
        return self._req_indices[: self.core.num_samples]

    @property
    def sizes(self) -> StepSizes:
        """Of the scheduled step."""
        core = self.core
        return StepSizes(
            core.num_tokens,
            core.num_rows,
            core.num_samples,
            core.max_seqlen_q,
            core.num_scored,
            core.num_decode_rows,
        )

    def wait_until_read(self) -> None:
        """Returns when the device has copied the last step, so that the next may be written."""
        self._staging.wait()

    def inputs(self, sizes: StepSizes | None = None) -> StepInputs:
        """The scheduled step; on a worker, the step of these ``sizes`` that rank 0 scheduled. On a
        GPU it is being copied: before the next step is written, call ``wait_until_read``."""
        sizes = sizes or self.sizes
        self._staging.upload(self._table_begin + sizes.num_rows * self._table_row_bytes)
        return self._make_inputs(*sizes)

    def write_spare_rows(self, begin: int, end: int, null_slot: int) -> None:
        """Makes rows begin:end of a step of one token a row idle: they write to ``null_slot`` and
        have no context. Block tables stay as they are: nothing reads those of idle rows."""
        for name in ("input_ids", "positions", "context_lens"):
            self._host[name][begin:end] = 0
        self._host["slot_mapping"][begin:end] = null_slot
        torch.arange(begin, end + 1, out=self._host["cu_seqlens_q"][begin : end + 1])

    def fill_dummy(self, query_lens: Sequence[int], block: int, block_size: int) -> StepSizes:
        """Writes a dummy step over ``block`` that samples at every token. Returns its sizes. The
        scheduler does not write again what it has written of a running row's block table."""
        meta = dummy_attention_metadata(
            query_lens, block=block, block_size=block_size, device="cpu"
        )
        num_tokens, num_rows = len(meta.positions), len(query_lens)
        max_blocks = self.block_table.shape[1]
        table = meta.block_table[:, :max_blocks]
        self.block_table[:num_rows, : table.shape[1]] = table
        for name in ("slot_mapping", "cu_seqlens_q", "context_lens"):
            values = getattr(meta, name)
            self._host[name][: len(values)] = values
        self._host["sample_tokens"][:num_tokens] = torch.arange(num_tokens)
        self._host["sample_positions"][:num_tokens] = 1
        return StepSizes(num_tokens, num_rows, num_tokens, meta.max_seqlen_q)

    def _new_inputs(
        self, tokens: int, rows: int, samples: int, max_seqlen_q: int, scored: int, decoding: int
    ) -> StepInputs:
        on_device = self._device
        return StepInputs(
            input_ids=on_device["input_ids"][:tokens],
            attention=AttentionMetadata(
                positions=on_device["positions"][:tokens],
                slot_mapping=on_device["slot_mapping"][:tokens],
                cu_seqlens_q=on_device["cu_seqlens_q"][: rows + 1],
                context_lens=on_device["context_lens"][:rows],
                block_table=on_device["block_table"][:rows],
                max_seqlen_q=max_seqlen_q,
                num_decode_rows=decoding,
            ),
            sample_tokens=on_device["sample_tokens"][:samples],
            rows=SampleRows(
                req_indices=self._req_indices[:samples],
                positions=on_device["sample_positions"][:samples],
                banned=self._banned[:samples],
            ),
            scored=ScoredRows(
                on_device["scored_tokens"][:scored], on_device["scored_targets"][:scored]
            )
            if scored
            else None,
        )
