"""Work for a client that disconnects is cancelled at once."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from s1engine.server.streaming import EventStream, merge, unless_disconnected


class Client:
    """Receives what an ASGI application sends, and disconnects on request."""

    def __init__(self, leave_after: int | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._gone = asyncio.Event()
        self._leave_after = leave_after
        if leave_after == 0:
            self._gone.set()

    async def receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self._leave_after is not None and len(self.sent) > self._leave_after:
            self._gone.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Yields, then waits forever; records whether it was closed."""

    def __init__(self, *payloads: bytes, endless: bool) -> None:
        self._payloads = payloads
        self._endless = endless
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for payload in self._payloads:
                yield payload
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.closed = True


def test_a_stream_is_sent_whole() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"1", b"2", endless=False)
        stream = EventStream(source.events())
        await stream({"type": "http"}, client.receive, client.send)
        assert client.body == b"12" and source.closed
        assert client.sent[0]["status"] == 200
        assert dict(client.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
        assert client.sent[-1]["more_body"] is False

    asyncio.run(main())


@pytest.mark.parametrize("leave_after", [1, 2])
def test_a_stream_ends_when_the_client_leaves(leave_after: int) -> None:
    async def main() -> None:
        client, source = Client(leave_after), Source(b"1", b"2", endless=True)
        stream = EventStream(source.events())
        await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), 5)
        assert source.closed and len(client.sent) >= leave_after

    asyncio.run(main())


def test_work_is_cancelled_when_the_client_leaves() -> None:
    async def main() -> None:
        client = Client(leave_after=0)
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(unless_disconnected(client.receive, work()), 5)
        assert cancelled.is_set()

    asyncio.run(main())


def test_work_that_ends_gives_its_result_or_its_error() -> None:
    async def main() -> None:
        client = Client()

        async def give(value: int) -> int:
            return 6 // value

        assert await unless_disconnected(client.receive, give(2)) == 3
        with pytest.raises(ZeroDivisionError):
            await unless_disconnected(client.receive, give(0))

    asyncio.run(main())


async def count(n: int) -> AsyncGenerator[int, None]:
    for i in range(n):
        await asyncio.sleep(0)
        yield i


def test_merged_streams_keep_their_own_order() -> None:
    async def main() -> None:
        got: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async for i, item in merge([count(3), count(0), count(5)]):
            got[i].append(item)
        assert got == {0: [0, 1, 2], 1: [], 2: [0, 1, 2, 3, 4]}

    asyncio.run(main())


@pytest.mark.parametrize("others", [0, 2])
def test_streams_are_read_no_faster_than_they_are_wanted(others: int) -> None:
    taken = 0

    async def eager() -> AsyncGenerator[int, None]:
        nonlocal taken
        for taken in range(1, 100):
            yield taken

    async def main() -> None:
        async with contextlib.aclosing(merge([eager(), *map(count, [0] * others)])) as merged:
            await anext(merged)
            await asyncio.sleep(0.01)
            assert taken <= 3

    asyncio.run(main())


def test_an_error_of_one_stream_ends_all() -> None:
    async def fail() -> AsyncGenerator[bytes, None]:
        yield b"first"
        raise ValueError("broken")

    async def main() -> None:
        source = Source(endless=True)
        with pytest.raises(ValueError, match="broken"):
            async with contextlib.aclosing(merge([fail(), source.events()])) as merged:
                async for _ in merged:
                    pass
        assert source.closed

    asyncio.run(main())
