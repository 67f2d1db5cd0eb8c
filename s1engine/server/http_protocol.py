"""HTTP with bounds on what a client may send, how slowly it may send and read, and how much of both
is held for it. Knows nothing of the application."""

import asyncio
import socket
import struct
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_CONNECTIONS = 8192
MAX_HEADER_BYTES = 64 * 2**10
MAX_PIPELINED = 8  # requests of a connection that wait for the one before them
HEAD_S = 30.0  # for a whole head, from the connection or the first byte on
BODY_PAUSE_S = 60.0  # between two parts of a body
BODY_S = 300.0  # for a whole body
READ_PAUSE_S = 60.0  # for a client to read all that waits for it: at most a piece of a response
UNSENT_BYTES = 128 * 2**10  # that the kernel holds beyond what the client has room for
KEEP_ALIVE_S = 75  # an idle connection; above what clients and load balancers keep (5 to 60 s)


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections above ``max_connections``; those whose head, trailers or chunk extensions
    exceed ``max_header_bytes``, which the parser would buffer; those with more than
    ``max_pipelined`` waiting requests; and those that send or read too slowly.

    A response waits in the application, not in the transport: nothing is written while bytes of
    this connection are unsent.
    """

    max_connections = MAX_CONNECTIONS
    max_header_bytes = MAX_HEADER_BYTES
    max_pipelined = MAX_PIPELINED
    head_s = HEAD_S
    body_pause_s = BODY_PAUSE_S
    body_s = BODY_S
    read_pause_s = READ_PAUSE_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outside = 0  # bytes since a head or a chunk ended, those of the body left out
        self._in_body = False
        self._answering: Any = None  # uvicorn's cycle; ``cycle`` is that of the latest request
        self._body_end = 0.0  # time by which the body must be there
        self._timer: asyncio.TimerHandle | None = None  # of what the client sends
        self._read_timer: asyncio.TimerHandle | None = None  # while bytes are unsent

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # uvloop's TLS never resumes from 0
        _set_option(transport, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._set_timer(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        self._stop_read_timer()
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # --- what the client sends ---

    def data_received(self, data: bytes) -> None:
        self._outside += len(data)
        if self._timer is None:
            self._set_timer(self.head_s)
        super().data_received(data)
        if self._outside > self.max_header_bytes:
            self.transport.abort()
        elif self._in_body:
            left = self._body_end - self.loop.time()
            self._set_timer(min(self.body_pause_s, max(left, 0)))

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > self.max_header_bytes or len(self.pipeline) >= self.max_pipelined:
            self.transport.abort()
            raise ValueError("the head is too large, or too many requests wait")  # ends the parser
        self._outside = 0
        self._in_body = True
        self._body_end = self.loop.time() + self.body_s
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

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._abort)

    # --- what the client reads ---

    def pause_writing(self) -> None:
        """Bytes are unsent."""
        super().pause_writing()
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(self.read_pause_s, self._reset)

    def resume_writing(self) -> None:
        """All bytes are sent."""
        super().resume_writing()
        self._stop_read_timer()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _reset(self) -> None:
        # Else the kernel keeps what it has not sent, for minutes.
        _set_option(self.transport, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._abort()

    def _abort(self) -> None:
        self.transport.abort()


def _set_option(transport: Any, level: int, option: int, value: int | bytes) -> None:
    """Set an option of a connection's socket, if it is one of TCP."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(level, option, value)
