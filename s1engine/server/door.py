"""Where fronts come in, on a replica: runs its application for each call and sends what it says.

What the application says is held until the engine has begun with the request, or there is nothing
to begin with: until then the front may send the request to another replica, and the client does not
notice. Only who knows the door's secret is let in.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from s1engine.server.wire import (
    Call,
    Closing,
    Hello,
    Leave,
    Message,
    Over,
    Said,
    ToReplica,
    Welcome,
    Wire,
    tls,
    to_replica,
)

IDLE_S = 0.5  # without a call, after which a door that closes is closed

logger = logging.getLogger(__name__)


class Outbox:
    """What the application says of one call."""

    def __init__(self, number: int, wire: Wire, name: str) -> None:
        self.begun = False
        self._number = number
        self._wire = wire
        self._replica = (b"x-replica", name.encode())
        self._held: list[Message] = []
        self._open = False

    def begin(self) -> None:
        """The engine has begun: what there is may go."""
        if not self.begun:
            self.begun = True
            self.release()

    def release(self) -> None:
        """Nothing is held any more."""
        if not self._open:
            self._open = True
            self._wire.say(Said(self._number, self._held))

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's send."""
        said = dict(message)
        if said["type"] == "http.response.start":
            said["headers"] = [*said.get("headers", ()), self._replica]
        if not self._open:
            self._held.append(said)
            return
        self._wire.say(Said(self._number, [said]))
        await self._wire.room()


outbox: ContextVar[Outbox | None] = ContextVar("outbox", default=None)
"""Of the call that is being answered."""


class Door:
    """Listens until it is closed.

    Args:
        app: the ASGI application.
        lost: is its engine dead?
        name: of the replica, told to clients.
    """

    def __init__(self, app: Any, lost: Callable[[], bool], name: str) -> None:
        self.app, self.lost, self.name = app, lost, name
        self.secret = secrets.token_bytes(32)
        self.guests: set[_Guest] = set()

    async def open(self, host: str) -> int:
        """Listens on a free port of this address, and returns it."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Guest(self).wire, host, 0, ssl=tls(server=True)
        )
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def under_way(self) -> int:
        """Calls that are not over."""
        return sum(len(guest.calls) for guest in self.guests)

    async def close(self) -> None:
        """Asks the fronts to send nothing more, and waits for the end of what they sent."""
        for guest in self.guests:
            guest.wire.say(Closing())
        await asyncio.sleep(IDLE_S)
        while self.under_way:
            await asyncio.sleep(IDLE_S)
        self._server.close()
        for guest in list(self.guests):
            guest.wire.close()


class _Guest:
    """One front."""

    def __init__(self, door: Door) -> None:
        self.wire = Wire(to_replica, self._on, self._gone, trusted=False)
        self.calls: dict[int, asyncio.Task[None]] = {}
        self._door = door

    def _on(self, message: ToReplica) -> None:
        match message:
            case Hello(secret) if hmac.compare_digest(secret, self._door.secret):
                self.wire.trusted = True
                self._door.guests.add(self)
                self.wire.say(Welcome())
            case _ if not self.wire.trusted:
                raise ConnectionError("the secret is wrong")
            case Call():
                self.calls[message.number] = asyncio.ensure_future(self._answer(message))
            case Leave(number) if number in self.calls:
                self.calls[number].cancel()

    def _gone(self) -> None:
        self._door.guests.discard(self)
        for call in self.calls.values():
            call.cancel()

    async def _answer(self, call: Call) -> None:
        said = Outbox(call.number, self.wire, self._door.name)
        outbox.set(said)
        requests = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await asyncio.Event().wait()  # a client that leaves cancels the call
            raise AssertionError

        scope = {"type": "http", "asgi": {"version": "3.0"}, **call.scope}
        try:
            await self._door.app(scope, receive, said.send)
        except Exception as error:
            logger.error("the application failed", exc_info=error)
        finally:
            lost = not said.begun and self._door.lost()
            if not lost:
                said.release()
            self.wire.say(Over(call.number, lost))
            del self.calls[call.number]
