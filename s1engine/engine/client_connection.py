"""The engine process's end of the socket to its client: messages, and the heartbeat.

Knows nothing of the engine.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

from s1engine.engine import messages

HEARTBEAT_S = 1.0
ORPHAN_S = 3.0  # for the present step, or a load, after the other end has closed
MAX_UNSENT_BYTES = 2**26  # beyond, the reader has stopped reading, and steps pause
READ_BYTES = 2**18


class ClientConnection:
    """The engine's end of the socket. Sending never blocks; any thread may send, one receives.
    ConnectionError: the client closed."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._frames = messages.FrameReader()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._closing = select.poll()
        self._closing.register(connection, select.POLLRDHUP)

    @property
    def congested(self) -> bool:
        """True if too many bytes are unsent."""
        return len(self._unsent) > MAX_UNSENT_BYTES

    @property
    def closed(self) -> bool:
        """Has the client closed its end?"""
        return bool(self._closing.poll(0))

    def send(self, message: messages.FromEngine) -> None:
        """Sends as much as the socket accepts now, the rest with the next calls."""
        frame = messages.encode_frame(message)
        with self._lock:
            self._unsent += frame
            self._flush()

    def send_if_idle(self, message: messages.FromEngine) -> None:
        """``send`` unless something waits to be sent, which tells the client as much."""
        frame = messages.encode_frame(message)
        with self._lock:
            if not self._unsent:
                self._unsent += frame
                self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass

    def receive(self, timeout: float) -> list[messages.ToEngine]:
        """The messages that have arrived; waits up to ``timeout`` seconds for an event."""
        writers = [self._socket] if self._unsent else []
        readable, writable, _ = select.select([self._socket], writers, [], timeout)
        if writable:
            with self._lock:
                self._flush()
        if not readable:
            return []
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("the client has closed the connection")
        return [messages.to_engine_decoder.decode(body) for body in self._frames.feed(data)]

    def send_last(self, message: messages.FromEngine) -> None:
        """Sends a last message, and waits until all is sent."""
        with self._lock:
            self._socket.setblocking(True)
            self._unsent += messages.encode_frame(message)
            self._socket.sendall(self._unsent)
            self._unsent.clear()


class Heart:
    """Sends a heartbeat a second from a thread of its own, while the engine loads and steps. Calls
    ``on_orphaned`` if the client is gone and the process still runs ORPHAN_S later.

    Counts in heartbeats, not by a clock: time in which this process is stopped is no time.
    """

    def __init__(self, client: ClientConnection, on_orphaned: Callable[[], None]) -> None:
        self.working = False  # else the engine waits for messages
        self.completed = 0  # steps
        self._client = client
        self._on_orphaned = on_orphaned
        self._seen = 0
        self._stalled = self._orphaned = 0.0
        threading.Thread(target=self._run, name="s1engine-heart", daemon=True).start()

    def _run(self) -> None:
        while self._orphaned < ORPHAN_S:
            time.sleep(HEARTBEAT_S)
            self._beat()
        self._on_orphaned()

    def _beat(self) -> None:
        if self._client.closed:
            self._orphaned += HEARTBEAT_S
            return
        stalls = self.working and self.completed == self._seen
        self._stalled = self._stalled + HEARTBEAT_S if stalls else 0.0
        self._seen = self.completed
        with contextlib.suppress(OSError):  # closed just now
            self._client.send_if_idle(messages.Heartbeat(self._stalled))
