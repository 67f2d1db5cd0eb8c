"""Server-sent events, merged streams, and cancellation when the client disconnects.

Knows HTTP and asyncio, not engines or schemas. Work is cancelled as soon as the connection is
closed, whether or not anything was sent.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

T = TypeVar("T")

LARGE_BYTES = 2**14  # of an event: encoding it takes a while


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; cancel it and raise ClientDisconnect if the client leaves.

    As asyncio.timeout: it cancels the current task, so that the work needs no task of its own."""
    task = asyncio.current_task()
    assert task is not None
    by_others = task.cancelling()
    watch: asyncio.Task[None] | None = None
    left = ended = False

    def on_left(watch: "asyncio.Task[None]") -> None:
        nonlocal left
        if watch.cancelled():
            return
        watch.exception()  # of a broken connection: retrieved, or asyncio would log it
        if not ended:
            left = True
            task.cancel()

    try:
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(on_left)
        return await work
    except BaseException as error:
        only_left = left and task.uncancel() <= by_others
        if only_left and isinstance(error, asyncio.CancelledError):
            raise ClientDisconnect from error
        raise
    finally:
        ended = True
        if watch is not None:
            watch.cancel()
        work.close()  # if it has not begun


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, T]) -> AsyncGenerator[asyncio.Task[T], None]:
    """Run ``work`` as a task, which is cancelled and awaited when the block ends."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class DeferredResponse(Response):
    """A response that ``respond`` makes and sends in one call, which owns what it registers."""

    def __init__(self, respond: ASGIApp) -> None:
        super().__init__()
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._respond(scope, receive, send)


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        events: closed when the client leaves; BoundedProtocol drops a client that does not read.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        begin = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self._events):
            await send(begin)
            async for body in self._events:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if len(body) >= LARGE_BYTES:
                    await asyncio.sleep(0)  # a fast reader must not keep the loop
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield items of several streams as they come, each with the index of its stream.

    Items are read no faster than they are consumed. The first error closes all streams; so does
    closing the generator.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for item in streams[0]:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(1)

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await items.put((index, item))
            await items.put(None)
        except Exception as error:
            await items.put(error)

    num_open = len(streams)
    async with contextlib.AsyncExitStack() as pumps:
        for i, stream in enumerate(streams):
            await pumps.enter_async_context(_running(pump(i, stream)))
        while num_open:
            received = await items.get()
            if isinstance(received, BaseException):
                raise received
            if received is None:
                num_open -= 1
            else:
                yield received
