"""Attention metadata built by hand as a runner would: shuffled blocks, garbage past the contexts.

Knows no scheduler. Blocks of a row depend on (seed, row count, capacity) alone, so several steps
over the same rows share their tables as long as ``max_context`` stays the same.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from s1engine.ops import AttentionMetadata

UNDEFINED_BLOCK = 2**31 - 1  # past the context in a block table: must never be read


def block_tables(
    rows: int, max_context: int, block_size: int, num_blocks: int, seed: int
) -> Tensor:
    """Distinct random blocks [rows, max_blocks] for contexts of up to ``max_context`` tokens."""
    max_blocks = -(-max_context // block_size)
    assert rows * max_blocks <= num_blocks, "the cache is too small for these rows"
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(num_blocks, generator=generator)[: rows * max_blocks]
    return blocks.view(rows, max_blocks).to(torch.int32)


def meta_of(
    lens_q: Sequence[int], lens_ctx: Sequence[int], tables: Tensor, block_size: int
) -> AttentionMetadata:
    """Metadata of a step in which row b computes the last lens_q[b] of lens_ctx[b] tokens."""
    positions: list[int] = []
    slots: list[int] = []
    table = torch.full_like(tables, UNDEFINED_BLOCK)
    for row, (count, context) in enumerate(zip(lens_q, lens_ctx, strict=True)):
        assert 0 <= count <= context
        used = -(-context // block_size)
        table[row, :used] = tables[row, :used]
        for position in range(context - count, context):
            positions.append(position)
            block = int(tables[row, position // block_size])
            slots.append(block * block_size + position % block_size)
    starts = [0]
    for count in lens_q:
        starts.append(starts[-1] + count)
    return AttentionMetadata(
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(list(lens_ctx), dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(lens_q, default=0),
        num_decode_rows=len(list(itertools.takewhile(lambda count: count == 1, lens_q))),
    )


def make_meta(
    lens_q: Sequence[int],
    lens_ctx: Sequence[int],
    block_size: int,
    num_blocks: int,
    seed: int = 0,
    max_context: int | None = None,
) -> AttentionMetadata:
    """``meta_of`` with tables drawn for ``max_context`` (default: the longest context)."""
    capacity = max_context if max_context is not None else max(lens_ctx, default=0)
    tables = block_tables(len(lens_q), capacity, block_size, num_blocks, seed)
    return meta_of(lens_q, lens_ctx, tables, block_size)


def hide_blocks_before_windows(meta: AttentionMetadata, block_size: int, window: int) -> None:
    """Undefine the entries of the block table that no window of the step's tokens reaches."""
    if window == 0:
        return
    counts = meta.cu_seqlens_q.diff().tolist()
    for row, (count, context) in enumerate(zip(counts, meta.context_lens.tolist(), strict=True)):
        oldest = max(context - count - window + 1, 0)
        meta.block_table[row, : min(oldest, context) // block_size] = UNDEFINED_BLOCK
