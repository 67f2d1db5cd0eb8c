"""The server process: how it drains and shuts down.

After SIGTERM or SIGINT the server rejects new requests and gives running ones
``--shutdown-timeout`` seconds; then their streams end with an error. A second signal ends it at
once. A dead engine ends the server after
a few seconds, during which /health reports it.
"""

import asyncio
import contextlib
import gc
import resource
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Protocol

import uvicorn

from s1engine.server.admission import Admission
from s1engine.server.service_manager import ServiceManager

LINGER_S = 3.0  # between the engine's death and the server's


class MonitoredBackend(Protocol):
    """What answers the requests: an engine, or replicas of one."""

    on_failure: Callable[[], None]

    @property
    def failure(self) -> BaseException | None:
        """What ended it, unless it was shut down."""

    def end_requests(self) -> None:
        """End what runs after the time to drain, with an error that clients see."""


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
        self._manager = ServiceManager()
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._backend.on_failure = lambda: self._end_by(self._linger())
        await super().startup(sockets)
        gc.freeze()  # a full collection would visit all modules, every few hundred requests
        if sockets is not None:
            self._log_started_message(sockets)
        self._manager.notify("READY=1")

    async def on_tick(self, counter: int) -> bool:
        self._manager.tick()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        self._manager.notify("STOPPING=1")
        await super().shutdown(sockets)

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
        self._backend.end_requests()
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
