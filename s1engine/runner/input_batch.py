"""The arrays of one step, shared with the scheduler without copying.

Host tensors are allocated once; the C++ scheduler writes into them through their numpy views, and
``inputs`` shows the written part. On a GPU the host side is pinned and copied asynchronously. If
several ranks share the model it stands in memory that all have, one array behind the other, so that
the scheduler of the first rank writes for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.ops import AttentionMetadata

ALIGNMENT = 64  # bytes
KEPT_VIEWS = 1024  # sizes of steps

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
}


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Host view of the rows that sample in this step; n of them."""

    req_indices: np.ndarray  # [n] int32
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
    """Buffers for up to ``max_tokens`` tokens in ``max_rows`` rows of ``max_blocks`` blocks, of
    which ``max_samples`` are sampled; None: one a row. ``share`` makes memory of so many bytes,
    zeros, if it shall not be this process's alone."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        device: str,
        max_samples: int | None = None,
        share: Callable[[int], Tensor] | None = None,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_FIELDS, (max_rows,))
        shapes |= {"block_table": (max_rows, max_blocks), "cu_seqlens_q": (max_rows + 1,)}
        shapes |= dict.fromkeys(("input_ids", "positions", "slot_mapping"), (max_tokens,))
        samples = (max_samples or max_rows,)
        shapes |= {name: samples for name in _FIELDS if name.startswith("sample_")}
        self.device = device
        if share is None:
            self._host = {
                name: torch.zeros(shapes[name], dtype=dtype, pin_memory=device != "cpu")
                for name, dtype in _FIELDS.items()
            }
        else:
            self._host = _cut(share, shapes)
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
        # A GPU needs a new copy each time; in main memory steps come in the same sizes again.
        keep = lru_cache(KEPT_VIEWS if device == "cpu" else 0)
        self._make = keep(self._make_inputs)

    @property
    def req_indices(self) -> np.ndarray:
        """Of the rows that sample in the planned step, [n] int32; a view."""
        return self._req_indices[: self.core.num_samples]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of the planned step: tokens, rows, rows that sample, tokens of the longest row."""
        core = self.core
        return core.num_tokens, core.num_rows, core.num_samples, core.max_seqlen_q

    def inputs(self, sizes: tuple[int, int, int, int] | None = None) -> StepInputs:
        """What the scheduler has written; one of another rank, a step of these ``sizes``."""
        return self._make(*(sizes or self.sizes))

    def fill_dummy(self, tokens: int, block: int, block_size: int) -> tuple[int, int, int, int]:
        """Writes a step whose rows begin in ``block`` and sample at every token, in as many rows as
        there can be. Returns its sizes. Before the scheduler's first step alone."""
        host, most = self._host, len(self._host["context_lens"])
        rows = min(tokens, most)
        lengths = torch.full((rows,), tokens // rows, dtype=torch.int32)
        lengths[: tokens % rows] += 1
        host["cu_seqlens_q"][1 : rows + 1] = lengths.cumsum(0)
        host["context_lens"][:rows] = lengths
        host["block_table"][:rows, : -(-int(lengths[0]) // block_size)] = block
        host["slot_mapping"][:tokens] = block * block_size + torch.arange(tokens) % block_size
        host["sample_tokens"][:tokens] = torch.arange(tokens)
        host["sample_positions"][:tokens] = 1
        return tokens, rows, tokens, int(lengths[0])

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
                req_indices=self._req_indices[:samples],
                positions=self._on_device("sample_positions", samples),
                banned=self._banned[:samples],
            ),
        )

    def _on_device(self, name: str, size: int) -> Tensor:
        tensor = self._host[name][:size]
        return tensor if self.device == "cpu" else tensor.to(self.device, non_blocking=True)


def _cut(share: Callable[[int], Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The fields one behind the other, each at a multiple of ALIGNMENT."""
    sizes = {name: prod(shapes[name]) * dtype.itemsize for name, dtype in _FIELDS.items()}
    strides = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
    parts = torch.split(share(sum(strides)), strides)
    return {
        name: part[: sizes[name]].view(_FIELDS[name]).view(shapes[name])
        for name, part in zip(_FIELDS, parts, strict=True)
    }
