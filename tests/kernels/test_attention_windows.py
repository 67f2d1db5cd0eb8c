"""Sliding windows and attention sinks in both attention kernels: blocks before the windows are not
read, splits cut the window, and a window that holds the context changes no bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.ops import AttentionMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.ops.triton_ops import TritonOps
from tests.kernels.oracle import assert_as_good_as, attention_case, in_double
from tests.kernels.test_attention import DTYPES, EDGES, HEADS, ROWS, SCALE, decode
from tests.ops.test_torch_ops import randn
from tests.paged import hide_blocks_before_windows

TORCH, TRITON = TorchOps(), TritonOps()
WINDOWS = st.sampled_from([0, 1, 15, 16, 17, 64, 65]) | st.integers(1, 140)


def check(
    case: tuple[Tensor, Tensor, Tensor, AttentionMetadata],
    block_size: int,
    window: int,
    sinks: Tensor | None,
    num_splits: int | None,
) -> None:
    """``num_splits``: of a decode step; None: any step, as TritonOps runs it."""
    q, k, v, meta = case
    truth = in_double(q, k, v, SCALE, meta, window, sinks)
    hide_blocks_before_windows(meta, block_size, window)
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta, window, sinks)
    if num_splits is None:
        out = TRITON.paged_attention(q, k, v, SCALE, meta, window, sinks)
    else:
        out, space = decode(q, k, v, meta, num_splits, window, sinks)
        assert not space.arrivals.any()
    assert_as_good_as(out, by_torch, truth, slack=2)


@settings(max_examples=10)
@given(
    contexts=st.lists(EDGES | st.integers(1, 150), min_size=1, max_size=3),
    heads=HEADS,
    dim=st.sampled_from([16, 32]),
    block_size=st.sampled_from([16, 64, 128]),
    num_splits=st.sampled_from([1, 2, 4, 32]),
    dtype=DTYPES,
    window=WINDOWS,
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_decode(
    contexts: list[int],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    num_splits: int,
    dtype: torch.dtype,
    window: int,
    with_sinks: bool,
    seed: int,
) -> None:
    case = attention_case([(1, n) for n in contexts], block_size, (*heads, dim), dtype, seed)
    sinks = 3 * randn(heads[0], seed=seed) if with_sinks else None
    check(case, block_size, window, sinks, num_splits)


@settings(max_examples=6)
@given(
    lens=st.lists(ROWS, min_size=1, max_size=3).filter(lambda rows: any(n for n, _ in rows)),
    heads=HEADS,
    block_size=st.sampled_from([16, 64]),
    dtype=DTYPES,
    window=WINDOWS,
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prefill(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    window: int,
    with_sinks: bool,
    seed: int,
) -> None:
    case = attention_case(lens, block_size, (*heads, 16), dtype, seed)
    sinks = 3 * randn(heads[0], seed=seed) if with_sinks else None
    check(case, block_size, window, sinks, None)


@pytest.mark.parametrize("lens", [[(1, 40)], [(20, 40), (5, 7)]])
def test_a_window_that_holds_the_context_changes_no_bit(lens: list[tuple[int, int]]) -> None:
    q, k, v, meta = attention_case(lens, 16, (6, 2, 16), torch.float16)
    whole = TRITON.paged_attention(q, k, v, SCALE, meta)
    assert torch.equal(TRITON.paged_attention(q, k, v, SCALE, meta, 40), whole)
    assert not torch.equal(TRITON.paged_attention(q, k, v, SCALE, meta, 30), whole)


def test_an_idle_row_with_a_window_and_sinks_is_zero() -> None:
    q, k, v, meta = attention_case([(1, 40), (1, 20)], 16, (4, 2, 16), torch.float32)
    meta.context_lens[0] = 0
    sinks = torch.tensor([0.0, 3.0, -3.0, 1.0])
    out, _ = decode(q, k, v, meta, 4, 10, sinks)
    assert not out[0].any() and bool(out[1].isfinite().all())
