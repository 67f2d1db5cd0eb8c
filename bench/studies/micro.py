"""Small parts of a step, timed by ``pytest bench/studies/micro.py --benchmark-enable``.

Each test times one call of the hot path; its name holds the sizes. Without ``--benchmark-enable``
every test runs once, so that the suite notices a broken one.
"""

from typing import Any

import numpy as np
import torch

from s1engine import _core
from s1engine.config import BUNDLED_MODEL
from s1engine.ops import AttentionMetadata, SamplingMetadata, select_ops
from s1engine.runner.input_batch import InputBatch
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer

BLOCK = 16


def test_schedule_and_update_256_rows(benchmark: Any) -> None:
    """The scheduler's work on a decode step: schedule, write the batch, append the tokens."""
    rows, context, steps = 256, 512, 4096
    blocks = -(-(context + steps) // BLOCK)
    scheduler = _core.Scheduler(
        num_blocks=rows * blocks,
        block_size=BLOCK,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * context,
    )
    batch = InputBatch(max_tokens=rows * context, max_rows=rows, max_blocks=blocks, device="cpu")
    rng = np.random.default_rng(0)
    for i in range(rows):
        prompt = rng.integers(3, 1000, context).astype(np.int32)
        scheduler.add(i, prompt, max_len=context + steps)
    sampled = np.full(rows, 7, np.int64)

    def step() -> None:
        scheduler.schedule(batch.core)
        scheduler.update(sampled)

    step()
    benchmark.pedantic(step, rounds=50, iterations=20, warmup_rounds=1)
    assert batch.core.num_tokens == rows


def test_detokenize_one_token(benchmark: Any) -> None:
    """Text of the next token of a stream."""
    tokenizer = Tokenizer.from_dir(BUNDLED_MODEL)
    stream = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("b=3+4=7\n")
    assert benchmark(stream.push, ids[:1]) == "b"


def test_paged_attention_64_rows_of_1024(benchmark: Any) -> None:
    """Decode attention of one layer: 8 query heads on 2 KV heads of 64."""
    rows, context, heads, kv_heads, dim = 64, 1024, 8, 2, 64
    blocks = context // BLOCK
    k, v = (torch.randn(rows * blocks, kv_heads, BLOCK, dim) for _ in range(2))
    meta = AttentionMetadata(
        positions=torch.full((rows,), context - 1, dtype=torch.int32),
        slot_mapping=torch.arange(rows) * blocks * BLOCK,
        cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        block_table=torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks),
        max_seqlen_q=1,
    )
    q = torch.randn(rows, heads, dim)
    ops = select_ops("cpu")
    out = benchmark(ops.paged_attention, q, k, v, dim**-0.5, meta)
    assert out.isfinite().all()


def _sampling(rows: int, temperature: float, top_p: float) -> SamplingMetadata:
    return SamplingMetadata(
        temperature=torch.full((rows,), temperature),
        top_k=torch.zeros(rows, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.zeros(rows),
        seeds=torch.arange(rows),
        positions=torch.full((rows,), 99),
        all_greedy=temperature == 0,
        filtered=top_p < 1,
    )


def _time_sampling(benchmark: Any, meta: SamplingMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Time ops.sample on fresh logits, which it overwrites; returns logits and tokens."""
    logits = 5 * torch.randn(len(meta.seeds), 151_665)  # peaked like a model's

    def fresh() -> tuple[tuple[torch.Tensor, SamplingMetadata], dict[str, Any]]:
        return (logits.clone(), meta), {}

    tokens = benchmark.pedantic(select_ops("cpu").sample, setup=fresh, rounds=50)
    return logits, tokens


def test_sample_greedy_8_of_152k(benchmark: Any) -> None:
    """Argmax over a large vocabulary."""
    logits, tokens = _time_sampling(benchmark, _sampling(8, 0.0, 1.0))
    assert torch.equal(tokens, logits.argmax(-1))


def test_sample_top_p_8_of_152k(benchmark: Any) -> None:
    """Temperature and nucleus over a large vocabulary."""
    logits, tokens = _time_sampling(benchmark, _sampling(8, 0.7, 0.9))
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
