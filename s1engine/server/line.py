"""A front's connection to one replica, and the calls that it makes there.

What comes for a client that takes it more slowly is joined. A connection that is lost ends its
calls, each with ReplicaLostError. Knows neither Ray nor how a replica is chosen.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from s1engine.server.wire import (
    Call,
    Closing,
    Hello,
    Leave,
    Message,
    Over,
    Said,
    ToFront,
    Welcome,
    Wire,
    tls,
    to_front,
)

CONNECT_S = 10.0


class ReplicaLostError(RuntimeError):
    """The replica cannot answer; it had not begun, unless the front knows better.

    Args:
        name: of the replica, if it lives and should be avoided.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica's door is."""

    name: str
    host: str
    port: int
    secret: bytes


class Answer:
    """What has come of a call so far."""

    def __init__(self) -> None:
        self.over = False
        self._messages: list[Message] = []
        self._error: ReplicaLostError | None = None
        self._fresh = False  # has something come since it was last taken?
        self._news = asyncio.Event()

    def put(self, messages: list[Message]) -> None:
        """Adds them; bodies that nobody has taken become one."""
        for message in messages:
            last = self._messages[-1] if self._messages else {}
            if message["type"] == last.get("type") == "http.response.body":
                last["body"] = last.get("body", b"") + message.get("body", b"")
                last["more_body"] = message.get("more_body", False)
            else:
                self._messages.append(message)
        self._fresh = True
        self._news.set()

    def end(self, error: ReplicaLostError | None = None) -> None:
        """Nothing more comes."""
        self.over = True
        self._error = error
        self._news.set()

    async def take(self) -> list[Message] | None:
        """What has come since; waits for it. The first may be empty: begun. None: that was all."""
        while not self._fresh and not self.over:
            await self._news.wait()
            self._news.clear()
        if self._fresh:
            self._fresh = False
            messages, self._messages = self._messages, []
            return messages
        if self._error is not None:
            raise self._error
        return None


class Line:
    """Calls to one replica, once ``connect`` has returned.

    Args:
        on_lost: called when it has ended.
    """

    def __init__(self, place: Place, on_lost: Callable[[], object]) -> None:
        self.name = place.name
        self.closing = False  # it ends with the calls that are under way
        self._place = place
        self._on_lost = on_lost
        self._ended = False
        self._welcome: asyncio.Future[None]
        self._answers: dict[int, Answer] = {}
        self._numbers = itertools.count()
        self._wire = Wire(to_front, self._on, self._lost, trusted=True)

    async def connect(self) -> None:
        """Raises OSError if it is not let in."""
        loop = asyncio.get_running_loop()
        self._welcome = loop.create_future()
        host, port = self._place.host, self._place.port
        async with asyncio.timeout(CONNECT_S):  # TimeoutError is an OSError
            await loop.create_connection(lambda: self._wire, host, port, ssl=tls(server=False))
            self._wire.say(Hello(self._place.secret))
            await self._welcome

    @property
    def under_way(self) -> int:
        """Calls that are not over."""
        return len(self._answers)

    async def answer(self, scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Messages of the answer to one HTTP request. Raises ReplicaLostError."""
        if self._ended:
            raise ReplicaLostError
        number = next(self._numbers)
        answer = self._answers[number] = Answer()
        self._wire.say(Call(number, scope, body))
        try:
            while (messages := await answer.take()) is not None:
                yield messages
        finally:
            self._answers.pop(number, None)
            if not answer.over:
                self._wire.say(Leave(number))

    async def ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body of the answer to a request without headers and body."""
        scope = {"method": method, "path": path, "query_string": b"", "headers": []}
        status, parts = 0, []
        async for messages in self.answer(scope, b""):
            for message in messages:
                status = message.get("status", status)
                parts.append(message.get("body", b""))
        return status, b"".join(parts)

    def close(self) -> None:
        """Ends what is under way."""
        self._wire.close()

    def _on(self, message: ToFront) -> None:
        match message:
            case Welcome():
                self._welcome.set_result(None)
            case Said(number, messages) if number in self._answers:
                self._answers[number].put(messages)
            case Over(number, lost) if number in self._answers:
                self._answers[number].end(ReplicaLostError(self.name) if lost else None)
            case Closing():
                self.closing = True

    def _lost(self) -> None:
        self._ended = True
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionError("the replica does not let us in"))
        self._on_lost()
        for answer in self._answers.values():
            if not answer.over:
                answer.end(ReplicaLostError())
