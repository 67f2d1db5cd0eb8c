"""Steps that are no request's: their times, their memory and the kernels they compile are measured
or prepared, and their results are dropped.

All tokens stand in one block, at position 0: what a step costs depends on sizes alone.
"""

from collections.abc import Sequence

import torch

from s1engine.ops import AttentionMetadata


def dummy_attention_metadata(
    query_lens: Sequence[int], *, block: int, block_size: int, device: str | torch.device
) -> AttentionMetadata:
    """A step whose row b has ``query_lens[b]`` tokens, the first of their sequence."""
    lens = torch.tensor(query_lens, dtype=torch.int32)
    num_tokens, longest = sum(query_lens), max(query_lens)
    starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
    starts[1:] = lens.cumsum(0)
    num_blocks = -(-longest // block_size)
    return AttentionMetadata(
        positions=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        slot_mapping=block * block_size + torch.arange(num_tokens, device=device) % block_size,
        cu_seqlens_q=starts.to(device),
        context_lens=lens.to(device),
        block_table=torch.full(
            (len(query_lens), num_blocks + 1), block, dtype=torch.int32, device=device
        ),
        max_seqlen_q=longest,
    )


def even_query_lens(num_tokens: int, max_rows: int) -> list[int]:
    """``num_tokens`` over as many rows as there can be, the longest first."""
    rows = min(num_tokens, max_rows)
    return [num_tokens // rows + (row < num_tokens % rows) for row in range(rows)]
