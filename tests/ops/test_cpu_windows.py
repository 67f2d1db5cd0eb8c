"""Sliding windows and attention sinks on the CPU: every instruction set and type of cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine._core import cpu
from s1engine.ops import AttentionMetadata, kv_quant
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from tests.kernels.oracle import assert_as_good_as, in_double
from tests.ops.test_kv_quant import attention_case, usable_isas
from tests.ops.test_torch_ops import randn
from tests.paged import hide_blocks_before_windows

TORCH, CPU = TorchOps(), CpuOps()
SCALE = 0.2
ROWS = st.integers(1, 700).flatmap(lambda n: st.tuples(st.integers(1, min(n, 40)), st.just(n)))


@settings(deadline=None, max_examples=40)
@given(
    lens=st.lists(ROWS, min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (14, 2), (3, 1)]),
    dim=st.sampled_from([6, 32, 64]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    int8=st.booleans(),
    window=st.integers(1, 130) | st.sampled_from([0, 512, 640]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_and_sinks(
    lens: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    int8: bool,
    window: int,
    with_sinks: bool,
    seed: int,
) -> None:
    stored = torch.int8 if int8 else dtype
    q, k, v, meta = attention_case(lens, block_size, (*heads, dim), dtype, stored, seed)
    sinks = 3 * randn(heads[0], seed=seed) if with_sinks else None
    plain = kv_quant.dequantize(k), kv_quant.dequantize(v)
    truth = in_double(q, *plain, SCALE, meta, window, sinks)
    hide_blocks_before_windows(meta, block_size, window)
    by_torch = TORCH.paged_attention(q, k, v, SCALE, meta, window, sinks)
    for name in usable_isas():
        cpu.set_isa(name)
        out = CPU.paged_attention(q, k, v, SCALE, meta, window, sinks)
        assert_as_good_as(out, by_torch, truth, slack=2)
    cpu.set_isa("auto")


def one_row(meta: AttentionMetadata, row: int) -> AttentionMetadata:
    first, end = meta.cu_seqlens_q[row : row + 2].tolist()
    return AttentionMetadata(
        positions=meta.positions[first:end],
        slot_mapping=meta.slot_mapping[first:end],
        cu_seqlens_q=torch.tensor([0, end - first], dtype=torch.int32),
        context_lens=meta.context_lens[row : row + 1],
        block_table=meta.block_table[row : row + 1],
        max_seqlen_q=end - first,
    )


def attend(case: tuple[Tensor, Tensor, Tensor], meta: AttentionMetadata, window: int) -> Tensor:
    return CPU.paged_attention(*case, SCALE, meta, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_is_the_same_alone_batched_and_cut(dtype: torch.dtype, threads: int) -> None:
    """A token of a long row equals the same token as the only one of its step, bit for bit."""
    lens, window = [(1, 1700), (60, 900), (1, 3), (9, 600)], 530
    q, k, v, meta = attention_case(lens, 16, (14, 2, 64), dtype, dtype, seed=5)
    hide_blocks_before_windows(meta, 16, window)
    before = cpu.num_threads()
    cpu.set_num_threads(threads)
    try:
        together = attend((q, k, v), meta, window)
        starts = meta.cu_seqlens_q.tolist()
        for row in range(len(lens)):
            tokens = slice(starts[row], starts[row + 1])
            alone = one_row(meta, row)
            assert torch.equal(attend((q[tokens], k, v), alone, window), together[tokens])
        for token in range(60):
            decode = replace(
                one_row(meta, 1),
                positions=meta.positions[1 + token : 2 + token],
                slot_mapping=meta.slot_mapping[1 + token : 2 + token],
                cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
                context_lens=torch.tensor([841 + token], dtype=torch.int32),
                max_seqlen_q=1,
            )
            at = slice(1 + token, 2 + token)
            assert torch.equal(attend((q[at], k, v), decode, window), together[at])
    finally:
        cpu.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_holds_the_context_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, v, meta = attention_case([(1, 700), (30, 90)], 16, (6, 2, 64), dtype, dtype, seed=1)
    assert torch.equal(attend((q, k, v), meta, 700), attend((q, k, v), meta, 0))
    assert not torch.equal(attend((q, k, v), meta, 600), attend((q, k, v), meta, 0))


def test_a_sink_takes_its_share_of_a_single_key() -> None:
    """One key with logit 0 and a sink s: the weight is 1 / (1 + e^s), in the limits too."""
    q, k, v, meta = attention_case([(1, 1)], 16, (4, 2, 32), torch.float32, torch.float32, seed=1)
    sinks = torch.tensor([0.0, 2.0, -1e4, 1e4])
    out = CPU.paged_attention(torch.zeros_like(q), k, v, SCALE, meta, 0, sinks).view(4, 32)
    value = v[meta.block_table[0, 0], :, 0].repeat_interleave(2, 0)
    expected = value / (1 + sinks.double().exp())[:, None]
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-30)
