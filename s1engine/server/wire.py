"""What a front and a replica say to each other, and one end of the connection on which they do.

Many HTTP requests travel over it at once, each under a number that the front chose. What is said
within one turn of the event loop is one write: a step of the engine gives text to many streams.
Bodies are msgpack, never pickled. Knows neither engines nor Ray, but for
what its variables say of encryption.
"""

import asyncio
import os
import ssl
from collections.abc import Callable
from typing import Any

import msgspec

from s1engine.engine.messages import FrameReader, frame_bytes
from s1engine.engine.ray_cluster import uses_tls

Message = dict[str, Any]  # of ASGI

HELLO_BYTES = 256  # that are read of somebody who has not said the secret


class Hello(msgspec.Struct, tag=True):
    """A front's first message."""

    secret: bytes


class Call(msgspec.Struct, tag=True):
    """A request, with what ASGI's scope says of it."""

    number: int
    scope: Message
    body: bytes


class Leave(msgspec.Struct, tag=True):
    """Nobody waits for this answer any more."""

    number: int


class Welcome(msgspec.Struct, tag=True):
    """The answer to a Hello; calls come after it."""


class Said(msgspec.Struct, tag=True):
    """Messages of an answer; the first, maybe of none, says that the engine has begun."""

    number: int
    messages: list[Message]


class Over(msgspec.Struct, tag=True):
    """Nothing more comes of this call."""

    number: int
    lost: bool  # the engine is dead and had not begun: another replica may be asked


class Closing(msgspec.Struct, tag=True):
    """The replica ends when it has answered what it was asked."""


ToReplica = Hello | Call | Leave
ToFront = Welcome | Said | Over | Closing

_encoder = msgspec.msgpack.Encoder()
to_replica: "msgspec.msgpack.Decoder[ToReplica]" = msgspec.msgpack.Decoder(ToReplica)
to_front: "msgspec.msgpack.Decoder[ToFront]" = msgspec.msgpack.Decoder(ToFront)


class Wire(asyncio.Protocol):
    """One end.

    Args:
        read: the decoder of what comes in.
        on: called with each message.
        on_lost: called once, when the connection is closed, by whoever.
        trusted: may the other end send more than a Hello? Can be set later.
    """

    def __init__(
        self,
        read: Any,
        on: Callable[[Any], None],
        on_lost: Callable[[], None],
        trusted: bool,
    ) -> None:
        self.trusted = trusted
        self._read, self._on, self._on_lost = read, on, on_lost
        self._frames = FrameReader()
        self._received = 0
        self._out: list[bytes] = []
        self._room = asyncio.Event()
        self._room.set()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop's are none of asyncio's classes
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if not self.trusted and self._received > HELLO_BYTES:
            self.close()
            return
        try:
            for body in self._frames.feed(data):
                self._on(self._read.decode(body))
        except (msgspec.DecodeError, ConnectionError):  # not one of us
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._room.set()
        self._on_lost()

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def say(self, message: ToReplica | ToFront) -> None:
        """Sends it before the loop's next turn but one. Lost if the connection is."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._write)
        self._out.append(frame_bytes(_encoder.encode(message)))

    def _write(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    async def room(self) -> None:
        """Waits until the other end has taken most of what was said."""
        await self._room.wait()

    def close(self) -> None:
        """At once."""
        if self._transport is not None:
            self._transport.abort()


def tls(server: bool) -> ssl.SSLContext | None:
    """Ray's own certificates, where its variables ask for TLS; both ends show theirs."""
    if not uses_tls():
        return None
    purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
    context = ssl.create_default_context(purpose, cafile=os.environ["RAY_TLS_CA_CERT"])
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.check_hostname = False  # nodes are named by address, certificates need not be
    context.verify_mode = ssl.CERT_REQUIRED
    return context
