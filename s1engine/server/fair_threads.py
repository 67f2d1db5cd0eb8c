"""Threads that clients share fairly. Knows neither HTTP nor what the threads compute."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

T = TypeVar("T")


class FairThreadPool:
    """Runs functions in threads; a free thread is the client's that has the fewest of them, and
    none has more than ``max_per_client``.

    All calls come from one event loop. A function whose caller is cancelled does not begin any
    more; if it runs already, its thread is busy until it returns.
    """

    def __init__(self, max_workers: int, name: str, *, max_per_client: int | None = None) -> None:
        self._max_workers = max_workers
        self._max_per_client = max_per_client or max_workers
        self._pool = futures.ThreadPoolExecutor(max_workers, name)
        self._num_running: Counter[str] = Counter()  # functions of each client
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # of each client that waits

    async def run(self, client: str, function: Callable[..., T], *args: Any) -> T:
        """Return what ``function`` returns."""
        loop = asyncio.get_running_loop()
        if self._num_running.total() >= self._max_workers or not self._may_begin(client):
            await self._turn(client)
        else:
            self._num_running[client] += 1
        try:
            running = self._pool.submit(function, *args)
        except BaseException:  # the system has no further thread
            self._end(client)
            raise
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end, client))
        return await asyncio.wrap_future(running)

    def _may_begin(self, client: str) -> bool:
        return self._num_running[client] < self._max_per_client

    async def _turn(self, client: str) -> None:
        """Wait for a thread, which then counts as the client's."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(client)
            raise

    def _end(self, client: str) -> None:
        """A thread of this client is free: the next function begins."""
        self._num_running[client] -= 1
        if not self._num_running[client]:
            del self._num_running[client]
        while waiting := list(filter(self._may_begin, self._waiting)):
            # Among equals the client that had no turn for the longest time.
            following = min(waiting, key=lambda name: self._num_running[name])
            turns = self._waiting.pop(following)
            while turns and turns[0].done():  # its caller has left
                turns.popleft()
            if not turns:
                continue
            turn = turns.popleft()
            if turns:
                self._waiting[following] = turns
            self._num_running[following] += 1
            turn.set_result(None)
            return
