"""The engine's process as its parent sees it: started, loaded, connected, ended."""

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import cast

from s1engine.engine import messages
from s1engine.engine.spawning import SpawnedProcess, spawn_engine
from s1engine.errors import EngineDeadError, ModelError, RequestError

READ_BYTES = 2**18
END_S = 5.0  # for the process to end by itself
REAP_S = 1.0  # for a process that has closed its connection to end, before its end is reported
# Why a signal may have ended a process.
CAUSES = {
    signal.SIGKILL: "out of memory? See the kernel's log",
    signal.SIGBUS: "was a file of the model truncated, or is /dev/shm full?",
    signal.SIGSEGV: "a crash in native code; PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: "a crash in native code; PYTHONFAULTHANDLER=1 shows where",
}

logger = logging.getLogger(__name__)


class EngineChild:
    """A process that loads a model. ``socket`` leads to it; ``frames`` reads what comes from it.

    Args:
        spawned: the process; None: a new one.
    """

    def __init__(self, start: messages.Start, spawned: SpawnedProcess | None = None) -> None:
        spawned = spawned or spawn_engine()
        self._process, self.socket = spawned.process, spawned.socket
        logger.debug("engine process %d started", self.pid)
        self.frames = messages.FrameReader()
        self.socket.sendall(messages.encode_frame(start))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait_until_ready(self) -> messages.Ready:
        """Waits until the model is loaded. Raises ModelError or RequestError as LLMEngine does,
        EngineDeadError if the process ends before."""
        while data := self._receive():
            for body in self.frames.feed(data):
                match messages.from_engine_decoder.decode(body):
                    case messages.Ready() as ready:
                        return ready
                    case messages.LoadFailed(message, param, of_model):
                        raise (
                            ModelError(message) if of_model else RequestError(message, param=param)
                        )
                    case messages.EngineDied(message):
                        raise EngineDeadError(f"the engine could not start: {message}")
        raise EngineDeadError(f"the engine could not start: {self.describe_end(END_S)}")

    def _receive(self) -> bytes:
        """Bytes from the process; none if its end or this one is closed."""
        try:
            return self.socket.recv(READ_BYTES)
        except OSError:
            return b""

    def _close_socket(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # another thread may receive
        self.socket.close()

    def end(self) -> None:
        """Closes the connection, and waits END_S for the process before it is killed."""
        self._close_socket()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        logger.debug("engine process %d ended", self.pid)

    def kill(self) -> None:
        """Kills the process and waits for its end. Does nothing if it has ended."""
        self._close_socket()
        self._process.kill()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            logger.error("the kernel does not end process %d of the engine", self.pid)

    def describe_end(self, timeout: float) -> str:
        """Waits up to ``timeout`` seconds for the end of the process; returns how it ended."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "the engine's process has closed its connection"
        if status >= 0:
            return f"the engine's process ended with status {status}"
        with contextlib.suppress(ValueError):
            number = signal.Signals(-status)
            cause = f" ({CAUSES[number]})" if number in CAUSES else ""
            return f"the engine's process was ended by {number.name}{cause}"
        return f"the engine's process was ended by signal {-status}"


class EngineConnection(asyncio.Protocol):
    """The connection to a process whose model is loaded. Calls nothing after ``close``.

    Args:
        receive: called with each message.
        report_end: called with the reason if the other end closes, or sends no valid frame.
    """

    def __init__(
        self,
        child: EngineChild,
        receive: Callable[[messages.FromEngine], None],
        report_end: Callable[[str], None],
    ) -> None:
        self._child = child
        self._receive = receive
        self._report_end = report_end
        self._closed = False
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by type

    def send(self, message: messages.ToEngine) -> None:
        """Sends a message, unless the connection is closed."""
        self.write(messages.encode_frame(message))

    def write(self, frame: bytes) -> None:
        """Sends a frame, unless the connection is closed."""
        if not self._transport.is_closing():
            self._transport.write(frame)

    async def close(self) -> None:
        """Closes the connection, whatever is unsent, and waits until it is closed."""
        self._closed = True
        self._transport.abort()
        await self._lost.wait()

    def data_received(self, data: bytes) -> None:
        for body in self._child.frames.feed(data):
            if not self._closed:
                self._receive(messages.from_engine_decoder.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        if not self._closed:
            self._reporting = asyncio.ensure_future(self._report(exc))

    async def _report(self, exc: Exception | None) -> None:
        end = await asyncio.to_thread(self._child.describe_end, REAP_S)
        if not self._closed:
            self._report_end(end if exc is None else f"{end}: {exc}")
