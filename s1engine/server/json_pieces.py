"""JSON in pieces: a large answer is never in memory as a whole, nor encoded in one go.

Knows asyncio and Starlette, not engines or schemas.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from s1engine.server.streaming import unless_disconnected

PIECE_BYTES = 64 * 2**10  # of a response, sent at once
ESCAPED_BYTES = 6  # of a character in JSON, at most
VALUE_BYTES = 32  # of a number, or around another value, at most
INLINE_ITEMS = 64  # of a list that is cheap to encode at once


class LazyList:
    """A JSON list whose items are made while it is encoded, once."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items


def json_pieces(value: Any) -> Iterator[bytes]:
    """Encode a JSON value of PIECE_BYTES a piece, but for the last one.

    LazyLists may stand in objects, and in lists of objects.
    """
    if _size_left(value, PIECE_BYTES) >= 0:
        yield msgspec.json.encode(value)
        return
    pieces, size = [], 0
    for part in _parts(value):
        pieces.append(part)
        size += len(part)
        if size >= PIECE_BYTES:
            joined = b"".join(pieces)
            whole = size - size % PIECE_BYTES
            for at in range(0, whole, PIECE_BYTES):
                yield joined[at : at + PIECE_BYTES]
            pieces, size = [joined[whole:]], size - whole
    if size:
        yield b"".join(pieces)


def _size_left(value: Any, size: int) -> int:
    """What the JSON text of a value leaves of ``size`` bytes at least; below 0: maybe nothing."""
    if isinstance(value, str):
        return size - ESCAPED_BYTES * len(value) - VALUE_BYTES
    if isinstance(value, dict):
        for name, item in value.items():
            size = _size_left(item, size - ESCAPED_BYTES * len(name) - VALUE_BYTES)
            if size < 0:
                break
        return size
    if isinstance(value, list):
        for item in value:
            size = _size_left(item, size - VALUE_BYTES)
            if size < 0:
                break
        return size
    return -1 if isinstance(value, LazyList) else size - VALUE_BYTES


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, LazyList):
        yield from _list((msgspec.json.encode(item),) for item in value.items)
    elif isinstance(value, dict):
        separator = b"{"
        for name, item in value.items():
            yield separator + msgspec.json.encode(name) + b":"
            yield from _parts(item)
            separator = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _list(map(_parts, value))
    else:
        yield msgspec.json.encode(value)


def _list(items: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    separator = b"["
    for item in items:
        yield separator
        yield from item
        separator = b","
    yield b"[]" if separator == b"[" else b"]"


def event_pieces(value: Any) -> Iterator[bytes]:
    """Encode a server-sent event of one JSON value, in pieces."""
    return itertools.chain((b"data: ",), json_pieces(value), (b"\n\n",))


class JsonResponse(Response):
    """A response of one JSON value. The next piece is encoded when the one before has left."""

    media_type = "application/json"

    def __init__(self, value: Any) -> None:
        pieces = json_pieces(value)
        first, second = next(pieces, b""), next(pieces, None)
        super().__init__(first)
        self._rest = None if second is None else itertools.chain((first, second), pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._rest is None:
            await super().__call__(scope, receive, send)
            return
        del self.headers["content-length"]
        with contextlib.suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send_all(send, self._rest))

    async def _send_all(self, send: Send, pieces: Iterator[bytes]) -> None:
        begin = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(begin)
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a fast reader must not keep the loop
        await send({"type": "http.response.body", "body": b"", "more_body": False})
