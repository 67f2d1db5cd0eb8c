"""The one-shot all-reduce: ranks are processes whose inboxes lie in memory that they share."""

import os
import signal
from multiprocessing import get_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.kernels.all_reduce import MAX_ROWS, Inboxes, all_reduce
from s1engine.ops.torch_ops import TorchOps

EPS = 1e-6
FORK = get_context("fork")  # so that addresses are the same in all ranks


def make_inboxes(size: int, width: int, dtype: torch.dtype) -> list[Inboxes]:
    """Of every rank. Its tensors keep the inboxes, which are one more attribute, alive."""
    nbytes = Inboxes.num_bytes(size, width, dtype)
    memory = torch.zeros((size, -(-nbytes // 16) * 16), dtype=torch.uint8).share_memory_()
    KEPT.append(memory)
    addresses = [inbox.data_ptr() for inbox in memory]
    cpu = torch.device("cpu")
    return [Inboxes.create(rank, addresses, width, dtype, cpu) for rank in range(size)]


KEPT: list[Tensor] = []


def call_inputs(
    rank: int, call: int, rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x of a rank; residual and norm of all."""
    own = torch.Generator().manual_seed(100 * call + rank)
    common = torch.Generator().manual_seed(100 * call + 99)
    x = torch.randn((rows, width), generator=own).to(dtype)
    residual = torch.randn((rows, width), generator=common).to(dtype)
    return x, residual, torch.randn(width, generator=common).to(dtype)


def run_calls(
    inboxes: Inboxes, calls: list[tuple[int, str]], results: list[Tensor] | None
) -> list[Tensor]:
    """What every call has written. The inputs are those of ``inboxes.rank``."""
    outs = []
    for i, (rows, kind) in enumerate(calls):
        x, residual, norm = call_inputs(inboxes.rank, i, rows, inboxes.width, inboxes.dtype)
        if kind == "sum":
            outs.append(all_reduce(x, inboxes))
            continue
        x = all_reduce(x, inboxes, residual, norm if kind == "norm" else None, EPS)
        outs += [residual, x] if kind == "norm" else [residual]
    for out, shared in zip(outs, results or (), strict=False):
        shared.copy_(out)
    return outs


def defined(size: int, calls: list[tuple[int, str]], inboxes: Inboxes) -> list[Tensor]:
    """The same, by torch."""
    outs, dtype = [], inboxes.dtype
    for i, (rows, kind) in enumerate(calls):
        total = torch.zeros(rows, inboxes.width)
        for rank in range(size):
            x, residual, norm = call_inputs(rank, i, rows, inboxes.width, dtype)
            total = total + x.float()
        if kind == "sum":
            outs.append(total.to(dtype))
            continue
        summed = (total + residual.float()).to(dtype)
        outs += [summed, TorchOps().rms_norm(summed, norm, EPS)] if kind == "norm" else [summed]
    return outs


@settings(max_examples=3)
@given(
    size=st.integers(1, 3),
    width=st.sampled_from([1, 40, 257]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["sum", "residual", "norm"])),
        min_size=3, max_size=8,
    ),
)  # fmt: skip
def test_all_ranks_have_the_bits_of_the_sum(
    size: int, width: int, dtype: torch.dtype, calls: list[tuple[int, str]]
) -> None:
    """Calls of different numbers of rows reuse both halves of an inbox."""
    ranks = make_inboxes(size, width, dtype)
    wanted = defined(size, calls, ranks[0])
    shared = [[torch.zeros_like(out).share_memory_() for out in wanted] for _ in ranks]
    others = [
        FORK.Process(target=run_calls, args=(ranks[rank], calls, shared[rank]))
        for rank in range(1, size)
    ]
    for other in others:
        other.start()
    run_calls(ranks[0], calls, shared[0])
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    for outs in shared:
        for i, (got, want) in enumerate(zip(outs, wanted, strict=True)):
            assert torch.equal(got, shared[0][i])
            torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-5,
                                       atol=1e-5)  # fmt: skip
    kinds = [kind for _, kind in calls for _ in range(2 if kind == "norm" else 1)]
    for got, want, kind in zip(shared[0], wanted, kinds, strict=True):
        if kind != "norm":  # sums are exact in any case
            assert torch.equal(got, want)
    assert not ranks[0].lost.any()
    assert int(ranks[0].exchanges.max()) == len(calls)


def test_numbers_of_exchanges_wrap_around() -> None:
    (alone,) = make_inboxes(1, 4, torch.float32)
    alone.exchanges.fill_(2**31 - 2)
    KEPT[-1][0, : 4 * MAX_ROWS].view(torch.int32).fill_(2**31 - 2)
    for _ in range(3):
        assert all_reduce(torch.ones(2, 4), alone).tolist() == [[1.0] * 4] * 2
    assert int(alone.exchanges[0]) < 0 and not alone.lost.any()


@pytest.mark.parametrize("aborted", [False, True])
def test_waiting_for_a_lost_rank_ends(aborted: bool) -> None:
    """After MAX_POLLS polls, or at once where the host says so."""
    rank, _ = make_inboxes(2, 8, torch.float32)
    rank.lost.fill_(int(aborted))
    all_reduce(torch.ones(1, 8), rank, **({} if aborted else {"max_polls": 5}))
    assert rank.lost.item() == 1
    all_reduce(torch.ones(3, 8), rank)  # waits for none any more


def test_a_rank_that_dies_after_its_exchange_is_seen() -> None:
    """What it has pushed counts; the next exchange finds it lost."""
    ranks = make_inboxes(2, 8, torch.float32)
    other = FORK.Process(target=_reduce_then_die, args=(ranks[1],))
    other.start()
    assert all_reduce(torch.full((1, 8), 2.0), ranks[0]).tolist() == [[5.0] * 8]
    other.join(60)
    assert other.exitcode == -signal.SIGKILL and not ranks[0].lost.any()
    all_reduce(torch.ones(1, 8), ranks[0], max_polls=5)
    assert ranks[0].lost.all()


def _reduce_then_die(inboxes: Inboxes) -> None:
    all_reduce(torch.full((1, 8), 3.0), inboxes)
    os.kill(os.getpid(), signal.SIGKILL)
