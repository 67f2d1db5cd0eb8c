"""Both attention kernels on odd shapes: contexts that end anywhere in a block, permuted blocks, NaN
behind every context, any number of splits."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.paged_decode import paged_decode, workspace_sizes
from s1engine.kernels.paged_prefill import paged_prefill
from s1engine.ops import AttentionMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.kernels.oracle import assert_as_good_as, attention_case, in_double
from tests.ops.test_torch_ops import randn

TORCH = TorchOps()
OPS = TritonOps()
SCALE = 0.2
DTYPES = st.sampled_from([torch.float32, torch.float16])
HEADS = st.sampled_from([(4, 4), (6, 1), (7, 1), (10, 2), (14, 2)])
EDGES = st.sampled_from([1, 15, 16, 17, 63, 64, 65])


class Workspace:
    """Partial results full of NaN, and counters."""

    def __init__(self, rows: int, kv_heads: int, dim: int, group: int, num_splits: int) -> None:
        _, counters = workspace_sizes(rows, kv_heads, dim, group)
        self.partials = torch.full((counters * num_splits * 16 * (dim + 2),), math.nan)
        self.arrivals = torch.zeros(counters, dtype=torch.int32)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttentionMetadata,
    num_splits: int,
    window: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Workspace]:
    group = q.shape[1] // k.shape[1]
    space = Workspace(q.shape[0], k.shape[1], q.shape[2], group, num_splits)
    out = paged_decode(
        q,
        k,
        v,
        meta.block_table,
        meta.context_lens,
        SCALE,
        space.partials,
        space.arrivals,
        num_splits,
        window,
        sinks,
    )
    return out, space


@settings(max_examples=15)
@given(
    contexts=st.lists(EDGES | st.integers(1, 150), min_size=1, max_size=3),
    heads=HEADS,
    dim=st.sampled_from([16, 32, 64]),
    block_size=st.sampled_from([16, 64, 128]),
    num_splits=st.sampled_from([1, 2, 4, 32]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_decode(
    contexts: list[int],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    num_splits: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = attention_case([(1, n) for n in contexts], block_size, (*heads, dim), dtype, seed)
    out, space = decode(*case, num_splits)
    q, k, v, meta = case
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta)
    assert_as_good_as(out, by_torch, in_double(q, k, v, SCALE, meta), slack=2)
    assert not space.arrivals.any()


def test_decode_of_a_long_context_gives_the_same_bits_again() -> None:
    case = attention_case([(1, 1100), (1, 3)], 64, (7, 1, 16), torch.float16)
    first, space = decode(*case, num_splits=8)
    again = paged_decode(
        *case[:3],
        case[3].block_table,
        case[3].context_lens,
        SCALE,
        space.partials,
        space.arrivals,
        8,
    )
    assert torch.equal(first, again) and not space.arrivals.any()
    q, k, v, meta = case
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta)
    assert_as_good_as(first, by_torch, in_double(q, k, v, SCALE, meta), slack=2)


def test_decode_of_an_idle_row_is_zero_and_leaves_others_alone() -> None:
    q, k, v, meta = attention_case([(1, 40), (1, 20)], 16, (4, 2, 16), torch.float32)
    busy, _ = decode(q, k, v, meta, num_splits=4)
    lens = meta.context_lens.clone()
    lens[0] = 0
    space = Workspace(2, 2, 16, 2, 4)
    out = paged_decode(q, k, v, meta.block_table, lens, SCALE, space.partials, space.arrivals, 4)
    assert not out[0].any() and torch.equal(out[1], busy[1])


@pytest.mark.parametrize("rows", [1, 3, 8, 40, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_splits_fill_the_device_and_the_workspace_holds_them(rows: int, kv_heads: int) -> None:
    splits = launch_table.decode_splits(rows, kv_heads)
    assert splits in (1, 2, 4, 8, 16, 32)
    assert splits == 32 or rows * kv_heads * splits * 2 > 2 * launch_table.NUM_SMS
    floats, counters = workspace_sizes(rows, kv_heads, 64, 7)
    assert counters == rows * kv_heads and floats == counters * splits * 16 * 66


ROWS = st.integers(1, 90).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=8)
@given(
    lens=st.lists(ROWS, min_size=1, max_size=4).filter(lambda rows: any(n for n, _ in rows)),
    heads=HEADS,
    dim=st.sampled_from([16, 64]),
    block_size=st.sampled_from([16, 64]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_prefill(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    q, k, v, meta = attention_case(lens, block_size, (*heads, dim), dtype, seed)
    out = paged_prefill(
        q,
        k,
        v,
        meta.block_table,
        meta.cu_seqlens_q,
        meta.context_lens,
        meta.max_seqlen_q,
        SCALE,
    )
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta)
    assert_as_good_as(out, by_torch, in_double(q, k, v, SCALE, meta), slack=2)


FEW = st.integers(2, 20).flatmap(lambda n: st.tuples(st.integers(2, n), st.just(n)))


@settings(max_examples=4)
@given(
    decoding=st.lists(st.integers(1, 40).map(lambda context: (1, context)), max_size=2),
    others=st.lists(FEW, min_size=1, max_size=2),
    window=st.sampled_from([0, 9]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_that_decode_beside_prompts(
    decoding: list[tuple[int, int]],
    others: list[tuple[int, int]],
    window: int,
    sinks: bool,
    seed: int,
) -> None:
    """They are computed as in a step of their own, bit by bit, the others as without them."""
    q, k, v, meta = attention_case([*decoding, *others], 16, (3, 1, 16), torch.float32, seed)
    extra = randn(3, seed=seed) if sinks else None
    assert meta.num_decode_rows >= len(decoding)
    out = OPS.paged_attention(q, k, v, SCALE, meta, window, extra)
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta, window, extra)
    assert_as_good_as(out, by_torch, in_double(q, k, v, SCALE, meta, window, extra), slack=2)
    n = meta.num_decode_rows
    if n:
        alone = replace(
            meta, cu_seqlens_q=meta.cu_seqlens_q[: n + 1], context_lens=meta.context_lens[:n],
            block_table=meta.block_table[:n], max_seqlen_q=1,
        )  # fmt: skip
        assert torch.equal(out[:n], OPS.paged_attention(q[:n], k, v, SCALE, alone, window, extra))
    whole = replace(meta, num_decode_rows=0)
    rest = OPS.paged_attention(q, k, v, SCALE, whole, window, extra)
    assert torch.equal(out[n:], rest[n:])


def test_a_token_does_not_depend_on_the_rows_around_it() -> None:
    q, k, v, meta = attention_case([(30, 70), (5, 5), (1, 33)], 16, (6, 2, 16), torch.float16)
    args = (meta.block_table, meta.cu_seqlens_q, meta.context_lens)
    together = paged_prefill(q, k, v, *args, 30, SCALE)
    alone = paged_prefill(
        q[30:35],
        k,
        v,
        meta.block_table[1:2],
        torch.tensor([0, 5], dtype=torch.int32),
        meta.context_lens[1:2],
        30,
        SCALE,
    )
    assert torch.equal(together[30:35], alone)
