"""What stands before every route: the API key and the size of bodies. Plain ASGI, no buffering."""

import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s1engine.server.answers import error_object

MAX_BODY_BYTES = 32 * 2**20
OPEN_PATHS = ("/health", "/")  # the page holds no secrets, and asks for the key itself


class ApiKey:
    """Lets a request pass only with ``Authorization: Bearer KEY``, OPEN_PATHS always."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the API key is missing or wrong"
                await refuse(send, 401, message, "authentication_error", "invalid_api_key")
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that announce more than ``max_bytes`` and cuts off those that grow beyond."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(send)
            return
        size = 0
        too_large = False

        async def counted() -> Message:
            nonlocal size, too_large
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                too_large = True
                return {"type": "http.disconnect"}
            return message

        async def watched(message: Message) -> None:
            if not too_large:
                await send(message)

        await self._app(scope, counted, watched)
        if too_large:
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        message = f"the body is larger than {self._max_bytes} bytes"
        await refuse(send, 413, message, "invalid_request_error", "body_too_large")


async def refuse(send: Send, status: int, message: str, kind: str, code: str) -> None:
    """Answers with an error object."""
    body = json.dumps(error_object(message, kind, code=code)).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
