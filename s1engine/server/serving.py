"""The server process: its HTTP protocol, and how it drains and shuts down.

After SIGTERM or SIGINT the server rejects new requests and gives running ones
``--shutdown-timeout`` seconds; a second signal ends it at once. A dead engine ends the server after
a few seconds, during which /health reports it.
"""

import asyncio
import contextlib
import resource
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s1engine.server.admission import Admission

MAX_CONNECTIONS = 8192
MAX_HEADER_BYTES = 64 * 2**10
HEAD_S = 30.0  # for a whole head, from the connection or the first byte on
BODY_PAUSE_S = 60.0  # between two parts of a body
KEEP_ALIVE_S = 75  # an idle connection; above what clients and load balancers keep (5 to 60 s)
LINGER_S = 3.0  # between the engine's death and the server's


class MonitoredBackend(Protocol):
    """What answers the requests: an engine, or replicas of one."""

    on_failure: Callable[[], None]

    @property
    def failure(self) -> BaseException | None:
        """What ended it, unless it was shut down."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP with bounds on what a client may send, and how slowly, before the application sees it.

    Closes connections above ``max_connections``; those whose head, trailers or chunk extensions
    exceed ``max_header_bytes``, which the parser would buffer; and those that send too slowly.
    """

    max_connections = MAX_CONNECTIONS
    max_header_bytes = MAX_HEADER_BYTES
    head_s = HEAD_S
    body_pause_s = BODY_PAUSE_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outside = 0  # bytes since a head or a chunk ended, those of the body left out
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._set_timer(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._outside += len(data)
        if self._timer is None:
            self._set_timer(self.head_s)
        super().data_received(data)
        if self._outside > self.max_header_bytes:
            self.transport.abort()
        elif self._in_body:
            self._set_timer(self.body_pause_s)

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > self.max_header_bytes:  # it came at once
            self.transport.abort()
            return
        self._outside = 0
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._outside -= len(body)
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self._outside = 0

    def on_message_complete(self) -> None:
        self._outside = 0
        self._in_body = False
        self._set_timer(None)
        super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, at once if the client reads nothing."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close)

    def _close(self) -> None:
        self.transport.abort()


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains before it exits.

    Args:
        shutdown_timeout: seconds for running requests to finish.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        backend: MonitoredBackend,
        admission: Admission,
        shutdown_timeout: float,
    ) -> None:
        super().__init__(config)
        self._backend = backend
        self._admission = admission
        self._shutdown_timeout = shutdown_timeout
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._backend.on_failure = lambda: self._end_by(self._linger())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._ending is None and hasattr(self, "_loop"):
            self._loop.call_soon_threadsafe(lambda: self._end_by(self._drain()))
        else:
            self.should_exit = True

    def _end_by(self, ending: Coroutine[Any, Any, None]) -> None:
        self._ending = asyncio.ensure_future(ending)

    async def _drain(self) -> None:
        await self._admission.drain(self._shutdown_timeout)
        self.should_exit = True

    async def _linger(self) -> None:
        await asyncio.sleep(LINGER_S)
        self.should_exit = True


def raise_open_file_limit() -> None:
    """Raise the limit of open files, and so of connections, to the system's maximum."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
