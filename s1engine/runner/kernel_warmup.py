"""Kernels of the steps that the host decides, compiled before the first request waits for one.

What is compiled for a step follows from a few classes of its sizes: rows and tokens up to the next
power of two, the longest row, and which rules of sampling are in use. One step of each class is
gone through here without running a kernel; what steps of many tokens need, the step that measures
memory has compiled.
"""

import torch
from torch import Tensor

from s1engine.models.decoder import Decoder
from s1engine.ops import AttentionMetadata, SamplingMetadata
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.runner.kv_cache import KVCache

LONGEST_ROW = 128  # tokens; the kernels take longer ones in such pieces


@torch.inference_mode()
def compile_kernels(
    decoder: Decoder, cache: KVCache, *, max_num_seqs: int, vocab_limit: int, progress: bool
) -> None:
    """All on all cores. Nothing is written to the cache."""
    model, device = decoder.config, decoder.device
    with compiled_ahead(progress=progress):
        for rows in _powers_of_2(max_num_seqs):
            meta = _step(rows, 1, cache.block_size, device)
            hidden = decoder.forward(meta.positions, cache.layers, meta)
            decoder.logits(hidden, vocab_limit)
            for longest in _powers_of_2(LONGEST_ROW)[1:]:
                meta = _step(rows, longest, cache.block_size, device)
                tokens = meta.positions.shape[0]
                q = hidden.new_empty((tokens, model.num_heads, model.head_dim))
                decoder.ops.paged_attention(q, *cache.layers[0], 1.0, meta)
        logits = torch.zeros((2, vocab_limit), dtype=torch.float32, device=device)
        for filtered in (False, True):
            for banned in (False, True):
                decoder.ops.sample(logits, _sampling(logits, filtered, banned))


def _powers_of_2(most: int) -> list[int]:
    """From 1 to the first that is no less than ``most``, which stands in its place."""
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def _step(rows: int, longest: int, block_size: int, device: torch.device) -> AttentionMetadata:
    """One row of ``longest`` tokens, the others of one, all in block 0."""
    tokens = rows - 1 + longest
    ints = torch.zeros(max(tokens, rows + 1), dtype=torch.int32, device=device)
    return AttentionMetadata(
        positions=ints[:tokens],
        slot_mapping=ints[:tokens].to(torch.int64),
        cu_seqlens_q=ints[: rows + 1],
        context_lens=ints[:rows],
        block_table=ints.new_zeros((rows, -(-longest // block_size) + 1)),
        max_seqlen_q=longest,
    )


def _sampling(logits: Tensor, filtered: bool, banned: bool) -> SamplingMetadata:
    rows = logits.shape[0]
    ones, ints = logits.new_ones(rows), torch.zeros(rows, dtype=torch.int64, device=logits.device)
    return SamplingMetadata(
        temperature=ones,
        top_k=ints.to(torch.int32),
        top_p=ones,
        min_p=ones,
        seeds=ints,
        positions=ints,
        all_greedy=False,
        filtered=filtered,
        banned=(ints[:1], ints[:1]) if banned else None,
    )
