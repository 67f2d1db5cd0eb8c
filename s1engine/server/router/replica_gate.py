"""ASGI middleware in front of a replica's application: only the router passes.

It checks the cluster's token before it reads a body, and delays a response until the engine has
begun with the request. A response that has not begun when the replica cannot answer becomes a 503
with the header NOT_BEGUN: the router may then send the request to another replica.
"""

import hmac
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s1engine.server.middleware import refuse

INTERNAL_PREFIX = b"x-s1engine-internal-"  # between router and replica; never from a client
CLIENT = INTERNAL_PREFIX + b"client"  # number of the client's API key
NOT_BEGUN = INTERNAL_PREFIX + b"not-begun"


class ReplicaGate:
    """The outermost middleware of a replica.

    Args:
        token: of the cluster; requests bring it as a bearer token.
        engine_failed: is the engine dead?
    """

    def __init__(self, app: ASGIApp, token: str, engine_failed: Callable[[], bool]) -> None:
        self.draining = False  # new requests are refused, /health with them
        self.num_in_flight = 0
        self._app = app
        self._authorization = b"Bearer " + token.encode()
        self._engine_failed = engine_failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            close = [(b"connection", b"close")]
            message = "the token of the cluster is missing or wrong"
            await refuse(send, 401, message, "authentication_error", "invalid_token", close)
        elif self.draining and not _concerns_running_requests(scope["path"]):
            await _refuse_unbegun(send)
        else:
            if CLIENT in headers:
                scope.setdefault("state", {})["client"] = headers[CLIENT].decode("latin-1")
            await self._respond(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = DelayedResponse(send, self._engine_failed)
        current_response.set(response)
        self.num_in_flight += 1
        try:
            await self._app(scope, receive, response.send)
        finally:
            self.num_in_flight -= 1


class DelayedResponse:
    """Holds a response back until the engine has begun or the response is complete."""

    def __init__(self, send: Send, engine_failed: Callable[[], bool]) -> None:
        self.begun = False  # the engine has produced output
        self._send = send
        self._engine_failed = engine_failed
        self._held: list[Message] = []

    async def send(self, message: Message) -> None:
        """ASGI's send. The application modifies no message after it has sent it."""
        if self.begun and not self._held:
            await self._send(message)
            return
        self._held.append(message)
        complete = message["type"] == "http.response.body" and not message.get("more_body")
        if complete and not self.begun and self._engine_failed():
            await _refuse_unbegun(self._send)
        elif complete or self.begun:
            for one in self._held:
                await self._send(one)
            self._held.clear()


current_response: ContextVar[DelayedResponse | None] = ContextVar("current_response", default=None)
"""Of the HTTP request that this task answers."""


def _concerns_running_requests(path: str) -> bool:
    return path == "/metrics" or path.endswith("/end_thinking")


async def _refuse_unbegun(send: Send) -> None:
    message = "the replica takes no requests"
    await refuse(send, 503, message, "server_error", "replica_closed", [(NOT_BEGUN, b"1")])
