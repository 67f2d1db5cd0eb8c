"""ASGI middleware before every route: API key, request id, limits of a body and of all bodies
together. Nothing is buffered."""

import hmac
import json
import logging
import re
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s1engine.server.admission import NotAdmitted
from s1engine.server.api.response_formatter import error_object
from s1engine.server.buffer_budget import BufferBudget, BufferLease
from s1engine.server.request_notes import MAX_LOGGED_NAMES, NOTES, RequestNotes, header_safe

REQUEST_ID = b"x-request-id"
REQUEST_ID_FORM = re.compile(rb"[!-~]{1,128}")
MAX_BODY_BYTES = 4 * 2**20
MAX_BRACKETS = 2**17  # opening ones: each may be a list or an object to allocate
MAX_QUOTES = 2**17  # not escaped: each string, a key too, has at least one
VALUE_BYTES = 64  # of a parsed value beside its text: a list, an object, a number and its place
OPEN_PATHS = ("/health", "/", "/docs")  # pages hold no secrets; the playground asks for the key
EXPOSED = ("x-request-id", "request-id", "retry-after", "x-s1engine-ignored", "x-s1engine-lowered")
PAGE_FILES = "/playground/"  # beginning of the paths of its files

logger = logging.getLogger(__name__)


class ApiKey:
    """Demands ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``, except on OPEN_PATHS
    and for the files of the page.

    Stores the number of the key in the scope's state as ``client``.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            client = self._client(dict(scope["headers"]))
            if client is None:
                message = "the API key is missing or wrong"
                await refuse(send, 401, message, "authentication_error", "invalid_api_key")
                return
            scope.setdefault("state", {})["client"] = client
        await self._app(scope, receive, send)

    def _client(self, headers: dict[bytes, bytes]) -> str | None:
        """Return the number of the request's key; the time does not depend on the key."""
        scheme, _, token = headers.get(b"authorization", b"").strip().partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        given = given or headers.get(b"x-api-key", b"").strip()
        client = None
        for number, key in enumerate(self._keys):
            if hmac.compare_digest(given, key):
                client = str(number)
        return client


def is_open(path: str) -> bool:
    """Does a path need no API key?"""
    return path in OPEN_PATHS or path.startswith(PAGE_FILES)


def cors_options(origins: Sequence[str]) -> dict[str, Any]:
    """Return the options of Starlette's middleware for pages of these origins. No cookies: clients
    send their key in a header."""
    return {
        "allow_origins": [*origins],
        "allow_methods": ["GET", "POST", "DELETE"],
        "allow_headers": ["*"],
        "expose_headers": [*EXPOSED],
    }


class RequestId:
    """Echoes ``X-Request-Id``, or generates one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = dict(scope["headers"]).get(REQUEST_ID, b"")
        if not REQUEST_ID_FORM.fullmatch(name):
            name = uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = name.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, name)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class NotesHeaders:
    """Opens the notes of each request, adds them to its response's headers, and logs each name of
    a field once.

    Args:
        strict: unknown fields are errors.
    """

    def __init__(self, app: ASGIApp, strict: bool = False) -> None:
        self._app = app
        self._strict = strict
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = RequestNotes(strict=self._strict)

        async def send_with_notes(message: Message) -> None:
            if message["type"] == "http.response.start" and (headers := notes.headers()):
                message["headers"] = [*message.get("headers", ()), *headers]
                self._log(notes, scope["path"])
            await send(message)

        token = NOTES.set(notes)
        try:
            await self._app(scope, receive, send_with_notes)
        finally:
            NOTES.reset(token)

    def _log(self, notes: RequestNotes, path: str) -> None:
        lines = [f"ignored unknown field {header_safe(name)}" for name in notes.ignored]
        lines += [f"lowered {name} to what the context leaves" for name in notes.lowered]
        for line in lines:
            if line not in self._logged and len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(line)
                logger.warning("%s, first in a request to %s", line, path)


class BodyLimit:
    """Rejects bodies of more than ``max_bytes``, by Content-Length, else when they exceed it, and
    those with more than MAX_BRACKETS or MAX_QUOTES, which take long to parse.

    A body counts in ``budget`` until its response has been sent. The scope's state has the
    request's BufferLease as ``lease``.
    """

    def __init__(
        self, app: ASGIApp, budget: BufferBudget | None = None, max_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self._app = app
        self._budget = budget or BufferBudget()
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(send)
            return
        lease = BufferLease(self._budget)
        scope.setdefault("state", {})["lease"] = lease
        try:
            await self._count(lease, scope, receive, send)
        finally:
            lease.release()

    async def _count(self, lease: BufferLease, scope: Scope, receive: Receive, send: Send) -> None:
        size = brackets = quotes = 0
        full: NotAdmitted | None = None

        def is_refused() -> bool:
            many = brackets > MAX_BRACKETS or quotes > MAX_QUOTES
            return full is not None or many or size > self._max_bytes

        async def count_bytes() -> Message:
            nonlocal size, brackets, quotes, full
            message = await receive()
            if body := message.get("body", b""):
                new = body.count(b"[") + body.count(b"{")
                size += len(body)
                brackets += new
                quotes += body.count(b'"') - body.count(b'\\"')
                try:
                    lease.reserve(2 * len(body) + VALUE_BYTES * (new + body.count(b",")))
                except NotAdmitted as error:
                    full = error
            return {"type": "http.disconnect"} if is_refused() else message

        async def send_unless_refused(message: Message) -> None:
            if not is_refused():
                await send(message)

        await self._app(scope, count_bytes, send_unless_refused)
        if full is not None:
            later = (b"retry-after", str(full.retry_after).encode())
            await refuse(send, full.status, str(full), "overloaded_error", full.code, [later])
        elif is_refused():
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        message = (
            f"the body has more than {self._max_bytes} bytes, {MAX_BRACKETS} brackets or "
            f"{MAX_QUOTES} quotes"
        )
        await refuse(send, 413, message, "invalid_request_error", "body_too_large")


async def refuse(
    send: Send,
    status: int,
    message: str,
    kind: str,
    code: str,
    more_headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Send an error object as the response."""
    body = json.dumps(error_object(message, kind, code=code)).encode()
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", b"application/json"), length, *more_headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
