"""ASGI middleware: all errors of Anthropic's routes in Anthropic's shape.

Inside, every error is OpenAI's object. Here it becomes ``{"type": "error", "error": ...}``.
"""

import json
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_THREADS = "thread_unsupported_request"  # by which Anthropic's clients go on without threads
PREFIX = "/v1/messages"
MODELS = "/v1/models"  # of both APIs: a header tells them apart
VERSION, REQUEST_ID, LENGTH = b"anthropic-version", b"request-id", b"content-length"
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def asks_for_anthropic(scope: Scope) -> bool:
    """Is a request one of Anthropic's API?"""
    path: str = scope["path"]
    named = path == MODELS or path.startswith(f"{MODELS}/")
    own = path == PREFIX or path.startswith(f"{PREFIX}/")
    return own or (named and any(name == VERSION for name, _ in scope["headers"]))


class AnthropicErrors:
    """Rewrites error objects, and repeats the request's id as ``request-id``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not asks_for_anthropic(scope):
            await self._app(scope, receive, send)
            return
        name: str = scope.get("state", {}).get("request_id", "")
        begin: Message | None = None  # of an error, until its body is whole
        body = b""

        async def send_rewritten(message: Message) -> None:
            nonlocal begin, body
            if message["type"] == "http.response.start":
                headers = _without(message.get("headers", ()), REQUEST_ID)
                message = {**message, "headers": [*headers, (REQUEST_ID, name.encode())]}
                if message["status"] >= 400:
                    begin = message
                    return
            if begin is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                rewritten = rewrite(body, begin["status"], name)
                headers = _without(begin["headers"], LENGTH)
                headers.append((LENGTH, str(len(rewritten)).encode()))
                await send({**begin, "headers": headers})
                await send({"type": "http.response.body", "body": rewritten})

        await self._app(scope, receive, send_rewritten)


def _without(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0].lower() != name]


def rewrite(body: bytes, status: int, request_id: str) -> bytes:
    """Return an error's body in Anthropic's shape; one that is no error object stays as it is."""
    try:
        error = json.loads(body)["error"]
        message, more = error["message"], {"param": error["param"], "code": error["code"]}
    except (ValueError, KeyError, TypeError):
        return body
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    own = {"type": kind, "message": message, **more}
    if more["code"] == NO_THREADS:
        own["details"] = {"error_code": NO_THREADS, "unsupported": [more["param"]]}
    return json.dumps({"type": "error", "error": own, "request_id": request_id}).encode()
