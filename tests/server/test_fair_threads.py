"""Threads are shared by clients: a newcomer's function is the next, whatever others have queued."""

import asyncio
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s1engine.server.fair_threads import FairThreadPool


@settings(max_examples=30, deadline=None)
@example(1, [(0, True), (0, True), (0, False), (1, False), (1, False)])
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
)
def test_the_client_with_fewest_threads_is_next(
    num_threads: int, calls: list[tuple[int, bool]]
) -> None:
    """All threads are busy while the calls come; some are cancelled while they wait."""
    order: list[str] = []
    free = threading.Event()

    async def main() -> None:
        pool = FairThreadPool(num_threads, "test")
        busy = [asyncio.ensure_future(pool.run("busy", free.wait, 60)) for _ in range(num_threads)]
        await asyncio.sleep(0)
        waiting = []
        for client, leaves in calls:
            waiting.append(asyncio.ensure_future(pool.run(str(client), order.append, str(client))))
            await asyncio.sleep(0)
            if leaves:
                waiting.pop().cancel()
        free.set()
        await asyncio.gather(*busy, *waiting)
        while pool._num_running:  # the callbacks of the last threads
            await asyncio.sleep(0)
        assert not pool._waiting
        # Every thread is free again.
        barrier = threading.Barrier(num_threads + 1)
        again = [asyncio.ensure_future(pool.run("a", barrier.wait)) for _ in range(num_threads)]
        await asyncio.sleep(0)
        await asyncio.to_thread(barrier.wait, 60)
        await asyncio.gather(*again)

    asyncio.run(main())
    stay = [str(client) for client, leaves in calls if not leaves]
    assert sorted(order) == sorted(stay)
    if num_threads == 1:  # one at a time: round by round, each client once
        for client in set(stay):
            first = order.index(client)
            assert all(order[:first].count(other) <= 1 for other in set(stay))


def test_a_thread_whose_caller_has_left_is_busy_until_it_returns() -> None:
    async def main() -> None:
        pool = FairThreadPool(1, "test")
        free = threading.Event()
        gone = asyncio.ensure_future(pool.run("a", free.wait, 60))
        await asyncio.sleep(0)
        gone.cancel()
        following = asyncio.ensure_future(pool.run("b", lambda: 7))
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert pool._num_running == {"a": 1}
        free.set()
        assert await following == 7

    asyncio.run(main())


def test_an_error_is_the_callers() -> None:
    async def main() -> None:
        pool = FairThreadPool(1, "test")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await pool.run("a", lambda: 1 // 0)

    asyncio.run(main())


def test_no_client_has_more_threads_than_its_part() -> None:
    async def main() -> None:
        pool = FairThreadPool(4, "test", max_per_client=2)
        free, begun = threading.Event(), threading.Semaphore(0)

        def work() -> None:
            begun.release()
            assert free.wait(60)

        flood = [asyncio.ensure_future(pool.run("a", work)) for _ in range(9)]
        await asyncio.sleep(0)
        other = asyncio.ensure_future(pool.run("b", work))  # while all threads of "a" are busy
        for _ in range(3):
            assert await asyncio.to_thread(begun.acquire, timeout=60)
        assert pool._num_running == {"a": 2, "b": 1}
        free.set()
        await asyncio.gather(*flood, other)

    asyncio.run(main())
