"""Tells systemd (``Type=notify``) that the server is ready and that its event loop runs.

Does nothing under any other supervisor. The protocol: man 3 sd_notify.
"""

import contextlib
import os
import socket
import time


class ServiceManager:
    """The socket in $NOTIFY_SOCKET, and the watchdog's period in $WATCHDOG_USEC, if there are
    any."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._period = int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6  # half of the limit
        self._next = 0.0

    def notify(self, state: str) -> None:
        """Send a state, such as ``READY=1``."""
        if not self._address:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager,
        ):
            manager.sendto(state.encode(), self._address)

    def tick(self) -> None:
        """Tell the watchdog that the event loop runs, if it is time. Called often by that loop."""
        if self._period and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._period
            self.notify("WATCHDOG=1")
