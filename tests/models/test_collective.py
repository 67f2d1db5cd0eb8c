"""Collectives in shared memory: exact results, the same bits on all ranks, and no hanging."""

import os
import signal
import threading
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine._core import cpu
from s1engine.models.collective import CollectiveError, SharedCollective
from s1engine.models.shard import Shard
from tests.models.rank_threads import on_ranks

SLOT = 1 << 18  # bytes that are exchanged at a time


def part(rank: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(shape, generator=generator).to(dtype)


# empty, less than a vector, odd tails, several slots
SHAPES = st.sampled_from([(0, 4), (1, 3), (5, 97), (3, SLOT // 4), (7, 40_001)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=20)
@given(st.integers(1, 5), SHAPES, DTYPES)
def test_all_reduce_sums_in_the_order_of_ranks_and_rounds_once(
    size: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    parts = [part(rank, *shape, dtype=dtype) for rank in range(size)]
    residual = part(size, *shape, dtype=dtype)
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other.float()

    def work(ranks: SharedCollective) -> tuple[Tensor, Tensor]:
        added = residual.clone()
        assert ranks.all_reduce_residual(parts[ranks.shard.rank], added) is None  # type: ignore[func-returns-value]
        return ranks.all_reduce(parts[ranks.shard.rank].clone()), added

    for plain, added in on_ranks(size, work):
        assert torch.equal(plain, total.to(dtype))
        assert torch.equal(added, (residual.float() + total).to(dtype))


@settings(max_examples=20)
@given(st.integers(1, 4), SHAPES)
def test_gather_concatenates_on_rank_0(size: int, shape: tuple[int, int]) -> None:
    parts = [part(rank, *shape, dtype=torch.float32) for rank in range(size)]
    first, *others = on_ranks(size, lambda ranks: ranks.gather(parts[ranks.shard.rank]))
    assert torch.equal(first, torch.cat(parts, dim=1))
    assert all(torch.equal(*pair) for pair in zip(others, parts[1:], strict=True))
    gathered = on_ranks(size, lambda ranks: ranks.all_gather(parts[ranks.shard.rank]))
    assert all(torch.equal(first, everywhere) for everywhere in gathered)


def test_many_calls_in_a_row_do_not_mix() -> None:
    """Slots are rewritten while slower ranks may still be reading."""

    def work(ranks: SharedCollective) -> list[float]:
        own = float(10**ranks.shard.rank)
        return [
            ranks.all_reduce(torch.full((67,), own * (i % 7)))[i % 67].item() for i in range(2000)
        ]

    expected = [111.0 * (i % 7) for i in range(2000)]
    assert on_ranks(3, work) == [expected] * 3


def test_calls_are_recorded_and_replayed() -> None:
    def work(ranks: SharedCollective) -> list[float]:
        x, residual, step = torch.ones(5), torch.zeros(5), cpu.RecordedStep()
        cpu.record_into(step)
        ranks.all_reduce_residual(x, residual)
        gathered = ranks.gather(residual.view(1, 5))
        cpu.record_into(None)
        assert not residual.any()  # recorded, not executed
        x += ranks.shard.rank
        step.replay()
        return [len(step), *residual.tolist(), gathered.sum().item()]

    assert on_ranks(2, work) == [[2, *[3.0] * 5, 30.0], [2, *[3.0] * 5, 15.0]]


def test_waiting_for_a_lost_rank_raises() -> None:
    memory = torch.zeros(SharedCollective.memory_bytes(2), dtype=torch.uint8)
    rank = SharedCollective(Shard(0, 2), memory)
    threading.Timer(0.1, rank.abort).start()
    with pytest.raises(CollectiveError, match="another rank has not come"):
        rank.all_reduce(torch.ones(3))
    with pytest.raises(CollectiveError):
        rank.gather(torch.ones(1, 3))


def test_rank_0_sees_what_other_processes_write() -> None:
    """Even if the process is killed right after its call."""
    memory = torch.zeros(SharedCollective.memory_bytes(2), dtype=torch.uint8).share_memory_()
    other = get_context("fork").Process(target=_reduce_then_die, args=(memory,))
    other.start()
    rank = SharedCollective(Shard(0, 2), memory)
    assert rank.all_reduce(torch.full((9,), 2.0)).tolist() == [5.0] * 9
    other.join()
    assert other.exitcode == -signal.SIGKILL
    rank.abort()
    with pytest.raises(CollectiveError):
        rank.all_reduce(torch.ones(9))


def _reduce_then_die(memory: Tensor) -> None:
    SharedCollective(Shard(1, 2), memory).all_reduce(torch.full((9,), 3.0))
    os.kill(os.getpid(), signal.SIGKILL)
