"""Logging of the package: one level, one format, and output that never blocks a server.

Every module logs to ``logging.getLogger(__name__)``. A program that embeds s1engine configures
logging itself; the command line and the engine process call ``configure_logging``. The server and
its engine's process also call ``detach_output``.
"""

import atexit
import contextlib
import logging
import os
import select
import sys
import threading
from typing import Any, TextIO

from s1engine.errors import RequestError

LEVEL_VARIABLE = "S1ENGINE_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_PENDING_BYTES = 2**20  # of output that is not written yet
DRAIN_S = 1.0  # for this output when the process ends
FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def configure_logging() -> None:
    """Writes the package's log lines of at least $S1ENGINE_LOG_LEVEL (default: warning) to stderr.
    Raises RequestError for an unknown level."""
    name = os.environ.get(LEVEL_VARIABLE, "warning")
    if name.lower() not in LEVELS:
        raise RequestError(
            f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}; got {name!r}",
            param=LEVEL_VARIABLE,
        )
    logging.basicConfig(format=FORMAT)
    logging.getLogger("s1engine").setLevel(name.upper())


def open_standard_descriptors() -> None:
    """Opens /dev/null for stdin, stdout and stderr where they are closed. Else a socket gets the
    number, and its client the messages."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def detach_output() -> None:
    """Makes stdout and stderr BackgroundStreams, whose last lines are written at exit."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        present = getattr(sys, name)
        stream = BackgroundStream(present or os.fdopen(fd, "w", closefd=False))
        atexit.register(stream.drain)
        setattr(sys, name, stream)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is present:
                handler.setStream(stream)


def num_dropped_lines() -> int:
    """Lines that this process could not write."""
    streams = (sys.stdout, sys.stderr)
    return sum(stream.dropped for stream in streams if isinstance(stream, BackgroundStream))


class BackgroundStream:
    """A text stream whose ``write`` never waits and never raises: a thread writes to ``stream``'s
    descriptor.

    Where that blocks (a pipe that is not read, a terminal under Ctrl-S) or fails (a full disk, a
    closed pipe), lines beyond MAX_PENDING_BYTES are dropped; a line reports their number as soon
    as one can be written again.
    """

    def __init__(self, stream: TextIO) -> None:
        self.dropped = 0  # lines
        self._reported = 0
        self._stream = stream
        self._fd = stream.fileno()
        self._pending = bytearray()
        self._writing = False
        self._changed = threading.Condition()  # reentrant: a signal handler may write
        threading.Thread(target=self._run, name="s1engine-output", daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Queues ``text``, or drops it."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if len(self._pending) + len(data) > MAX_PENDING_BYTES:
                self.dropped += data.count(b"\n")
            else:
                self._pending += data
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Does nothing: the thread writes as soon as it can."""

    def drain(self) -> None:
        """Waits up to DRAIN_S until all is written."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._pending or self._writing), DRAIN_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pending)
                self._writing = True
                data = bytes(self._pending)
                self._pending.clear()
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            self._write_all(data)
            if lost := self.dropped - self._reported:
                self._write_all(f"s1engine: {lost} lines of output were dropped\n".encode())
                self._reported += lost
        except OSError:  # not logged: that could not be written either
            with self._changed:
                self.dropped += data.count(b"\n")

    def _write_all(self, data: bytes) -> None:
        while data:
            with contextlib.suppress(BlockingIOError):  # another process has set it so
                data = data[os.write(self._fd, data) :]
                continue
            select.select([], [self._fd], [])
