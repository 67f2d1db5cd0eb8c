"""Compiles the kernels of single steps before the first request would wait for one.

A step's kernels depend on a few classes of its sizes: rows and tokens up to the next power of two,
the longest row, and which sampling rules are in use. One dummy step of each class runs here with
launches that only compile. The step that measures memory has compiled what large steps need.
"""

import torch
from torch import Tensor

from s1engine.models.interface import CausalLM
from s1engine.ops import AttentionMetadata, SamplingMetadata
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.runner.dummy_batch import dummy_attention_metadata
from s1engine.runner.kv_cache import KVCache

LONGEST_ROW = 128  # tokens; the kernels cut longer rows into such pieces


@torch.inference_mode()
def compile_kernels(
    decoder: CausalLM, cache: KVCache, *, max_num_seqs: int, vocab_limit: int, progress: bool
) -> None:
    """Compiles on all cores. Nothing is written to the cache."""
    model, device = decoder.config, decoder.device
    with compiled_ahead(progress=progress):
        for rows in _powers_of_2(max_num_seqs):
            meta = dummy_step(rows, 1, cache.block_size, device)
            hidden = decoder.forward(meta.positions, cache.layers, meta)
            decoder.logits(hidden, vocab_limit)
            for longest in _powers_of_2(LONGEST_ROW)[1:]:
                meta = dummy_step(rows, longest, cache.block_size, device)
                tokens = len(meta.positions)
                q = hidden.new_empty((tokens, model.num_heads, model.head_dim))
                for window in sorted(set(model.layer_windows)):
                    decoder.ops.paged_attention(q, *cache.layers[0], 1.0, meta, window)
        logits = torch.zeros((2, vocab_limit), dtype=torch.float32, device=device)
        for filtered in (False, True):
            for banned in (False, True):
                decoder.ops.sample(logits, dummy_sampling(logits, filtered, banned))


def _powers_of_2(most: int) -> list[int]:
    """1, 2, 4, ... below ``most``, then ``most`` itself."""
    return [1 << i for i in range((most - 1).bit_length())] + [most]


def dummy_step(rows: int, longest: int, block_size: int, device: torch.device) -> AttentionMetadata:
    """One row of ``longest`` tokens, the others of one."""
    query_lens = [longest] + [1] * (rows - 1)
    return dummy_attention_metadata(query_lens, block=0, block_size=block_size, device=device)


def dummy_sampling(logits: Tensor, filtered: bool, banned: bool) -> SamplingMetadata:
    """Neutral parameters for the rows of ``logits``, by way of the kernels that the flags need."""
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
