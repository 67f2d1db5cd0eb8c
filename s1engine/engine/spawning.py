"""Starts the engine's process before there is anything to tell it.

Loads in a few milliseconds, so that the child imports torch while its parent imports the server.
"""

import socket
import subprocess
import sys
from dataclasses import dataclass

PROCESS = "s1engine.engine.engine_process"


@dataclass(slots=True)
class SpawnedProcess:
    """A process that waits for its first message on ``socket``."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def discard(self) -> None:
        """Ends it; it has loaded nothing."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


def spawn_engine() -> SpawnedProcess:
    """Starts a process that loads no model yet."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
    return SpawnedProcess(process, ours)
