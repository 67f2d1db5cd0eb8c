"""The arrays of one step, shared with the scheduler without copying.

The runner owns the buffers. Host tensors are allocated once: the C++ scheduler writes a step into
them through ``core``, and ``inputs`` returns views of the part it has written. On a GPU the host
side is pinned and copied asynchronously. If worker processes share the model, the buffers lie in
shared memory, so the scheduler of rank 0 writes for all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import AttentionMetadata
from s1engine.runner.dummy_batch import dummy_attention_metadata

ALIGNMENT = 64  # bytes
CACHED_VIEWS = 1024  # sizes of steps

_FIELDS: dict[str, torch.dtype] = {
    "input_ids": torch.int32,
    "positions": torch.int32,
    "slot_mapping": torch.int64,
    "cu_seqlens_q": torch.int32,
    "context_lens": torch.int32,
    "block_table": torch.int32,
    "sample_tokens": torch.int32,
    "sample_req_indices": torch.int32,
    "sample_positions": torch.int64,
    "sample_banned": torch.uint8,
    "scored_tokens": torch.int32,
    "scored_targets": torch.int64,
}
_PER_TOKEN = ("input_ids", "positions", "slot_mapping", "scored_tokens", "scored_targets")


class StepSizes(NamedTuple):
    """Sizes of one step."""

    num_tokens: int
    num_rows: int
    num_samples: int  # rows of logits
    max_seqlen_q: int  # tokens of the longest row
    num_scored: int = 0  # prompt tokens whose log-probabilities are wanted


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
    """All that one step reads. On the CPU these are views of the buffers, valid for every later
    step of the same sizes."""

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
        self.device = device
        self.max_tokens = max_tokens
        if allocate is None:
            self._host = {
                name: torch.zeros(shapes[name], dtype=dtype, pin_memory=device != "cpu")
                for name, dtype in _FIELDS.items()
            }
        else:
            self._host = _split(allocate, shapes)
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
        # A GPU needs new copies in every step; in main memory the views of a size stay valid.
        self._make_inputs = lru_cache(CACHED_VIEWS if device == "cpu" else 0)(self._new_inputs)

    @property
    def req_indices(self) -> np.ndarray:
        """Of the rows that sample in the scheduled step, [n] int32; a view."""
        return self._req_indices[: self.core.num_samples]

    @property
    def sizes(self) -> StepSizes:
        """Of the scheduled step."""
        core = self.core
        return StepSizes(
            core.num_tokens, core.num_rows, core.num_samples, core.max_seqlen_q, core.num_scored
        )

    def inputs(self, sizes: StepSizes | None = None) -> StepInputs:
        """The scheduled step; on a worker, the step of these ``sizes`` that rank 0 scheduled."""
        if sizes is not None:
            return self._make_inputs(*sizes)
        core = self.core
        return self._make_inputs(
            core.num_tokens, core.num_rows, core.num_samples, core.max_seqlen_q, core.num_scored
        )

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
        self, tokens: int, rows: int, samples: int, max_seqlen_q: int, scored: int
    ) -> StepInputs:
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
                req_indices=self._req_indices[:samples],
                positions=self._on_device("sample_positions", samples),
                banned=self._banned[:samples],
            ),
            scored=ScoredRows(
                self._on_device("scored_tokens", scored), self._on_device("scored_targets", scored)
            )
            if scored
            else None,
        )

    def _on_device(self, name: str, size: int) -> Tensor:
        tensor = self._host[name][:size]
        return tensor if self.device == "cpu" else tensor.to(self.device, non_blocking=True)


def _split(
    allocate: Callable[[int], Tensor], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The fields one after another in one allocation, each aligned to ALIGNMENT."""
    sizes = {name: prod(shapes[name]) * dtype.itemsize for name, dtype in _FIELDS.items()}
    strides = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
    parts = torch.split(allocate(sum(strides)), strides)
    return {
        name: part[: sizes[name]].view(_FIELDS[name]).view(shapes[name])
        for name, part in zip(_FIELDS, parts, strict=True)
    }
