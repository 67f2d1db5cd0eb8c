"""The server's life: when it listens, how it ends, and with which status.

SIGTERM and SIGINT let nobody in any more and give those inside ``--shutdown-timeout`` seconds; a
second one does not wait. A dead engine ends the server too, a few seconds later, in which /health
says so.
"""

import asyncio
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s1engine.server.admission import Admission

MAX_HEADER_BYTES = 64 * 2**10
LINGER_S = 3.0  # between the engine's death and the server's


class Watched(Protocol):
    """What answers: an engine, or replicas of one."""

    on_failure: Callable[[], None]

    @property
    def failure(self) -> BaseException | None:
        """What ended it, if nobody wanted it to end."""


class BoundedProtocol(HttpToolsProtocol):
    """Hangs up on heads of more than MAX_HEADER_BYTES, which the parser would keep in memory."""

    _head_bytes = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES and not self._may_be_body(data):
                self.transport.close()
                return
        super().data_received(data)

    def _may_be_body(self, data: bytes) -> bool:
        end = data.find(b"\r\n\r\n")
        return end >= 0 and self._head_bytes - len(data) + end <= MAX_HEADER_BYTES

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """A uvicorn server that drains.

    Args:
        shutdown_timeout: seconds that open requests get at the end.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Watched,
        admission: Admission,
        shutdown_timeout: float,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._admission = admission
        self._shutdown_timeout = shutdown_timeout
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.on_failure = lambda: self._end(self._linger())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, wherever it interrupted."""
        if self._ending is None and hasattr(self, "_loop"):
            self._loop.call_soon_threadsafe(lambda: self._end(self._drain()))
        else:
            self.should_exit = True

    def _end(self, how: Any) -> None:
        self._ending = asyncio.ensure_future(how)

    async def _drain(self) -> None:
        await self._admission.drain(self._shutdown_timeout)
        self.should_exit = True

    async def _linger(self) -> None:
        await asyncio.sleep(LINGER_S)
        self.should_exit = True
