"""Target ``http``: raw bytes of a connection, through our protocol class into the application.

The first byte is the size of the pieces in which the others arrive, 0: all at once. No status of
500 or above, no exception, no task that outlives its connection, nothing left in the engine; and
the statuses do not depend on the pieces.
"""

import asyncio
import itertools
from collections.abc import Callable
from concurrent import futures
from typing import Any
from unittest import mock

import anyio.to_thread
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from s1engine.server.app import create_app
from s1engine.server.error_handlers import CLIENT_CLOSED_REQUEST
from s1engine.server.http_protocol import BoundedProtocol
from tests.fuzz.echo_engine import EchoEngine
from tests.fuzz.target import Target


class InlineLoop(asyncio.SelectorEventLoop):
    """An event loop that has no threads: what would run in one runs at once."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    @staticmethod
    async def run_sync(func: Callable[..., Any], *args: Any, **_: Any) -> Any:
        """The same for anyio.to_thread, which serves files."""
        return func(*args)

    async def settle(self) -> None:
        """Waits until every task waits for something outside of this process."""
        while self._ready:  # type: ignore[attr-defined]
            await asyncio.sleep(0)


class InlineExecutor(futures.Executor):
    """The same for threads of our own."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        done: futures.Future[Any] = futures.Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class MemoryTransport(asyncio.Transport):
    """A connection that ends in memory."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...


class Recorder:
    """Records the statuses of an application, and what it raises."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.statuses: list[int] = []
        self.errors: list[Exception] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def record(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, record)
        except Exception as error:
            self.errors.append(error)
            raise


LOOP = InlineLoop()
ENGINE = EchoEngine()
with mock.patch.object(futures, "ThreadPoolExecutor", InlineExecutor):
    APP = create_app(ENGINE)
RECORDER = Recorder(APP)
CONFIG = uvicorn.Config(RECORDER, http=BoundedProtocol, lifespan="off", log_config=None)
CONFIG.load()


async def _serve(pieces: list[bytes]) -> list[int]:
    """The statuses of a connection over which ``pieces`` arrive."""
    state = ServerState()
    protocol = BoundedProtocol(config=CONFIG, server_state=state, app_state={})
    transport = MemoryTransport()
    RECORDER.statuses, RECORDER.errors = [], []
    protocol.connection_made(transport)
    for piece in pieces:
        if transport.closed:
            break
        protocol.data_received(piece)
        await LOOP.settle()
    protocol.connection_lost(None)
    await LOOP.settle()
    assert not state.tasks, "a task outlives its connection"
    assert ENGINE.num_live == 0, "a request outlives its connection"
    if RECORDER.errors:
        raise RECORDER.errors[0]
    assert all(status < 500 for status in RECORDER.statuses), RECORDER.statuses
    return RECORDER.statuses


def _answered(statuses: list[int]) -> list[int]:
    """The statuses before the connection was dropped."""
    return list(itertools.takewhile(lambda status: status != CLIENT_CLOSED_REQUEST, statuses))


@mock.patch.object(anyio.to_thread, "run_sync", InlineLoop.run_sync)
def run(data: bytes) -> None:
    size, stream = (data[0], data[1:]) if data else (0, b"")
    whole = LOOP.run_until_complete(_serve([stream]))
    if size:
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        parts = LOOP.run_until_complete(_serve(pieces))
        # A connection may be dropped earlier if more of it arrives at once.
        assert all(
            one == other for one, other in zip(_answered(whole), _answered(parts), strict=False)
        )


WORDS = (
    *(b"GET ", b"POST ", b"HEAD ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n\r\n", b"\r\n"),
    *(b"Host: a\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    *(b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n"),
    *(b"Upgrade: websocket\r\n", b"Content-Type: application/json\r\n", b"X-Request-Id: "),
    *(route.path.encode() for route in APP.routes if hasattr(route, "path")),
    *(b'{"messages":[{"role":"user","content":"a"}]}', b'{"prompt":"a"}', b'"stream":true'),
)
TARGETS = {"http": Target(run, WORDS)}
