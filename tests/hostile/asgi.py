"""A client that calls an ASGI application, and may disconnect at any moment."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

JSON_TYPE = (b"content-type", b"application/json")


@dataclass
class Call:
    """One request. ``heads`` and ``ends``: how often a response began and ended."""

    path: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (JSON_TYPE,)
    status: int = 0
    answer: bytes = b""
    heads: int = 0
    ends: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the client has disconnected

    async def run(self, app: ASGIApp) -> "Call":
        """Sends the request, and returns when the application has returned."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST" if self.body else "GET",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(self.headers),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        received = False

        async def receive() -> Message:
            nonlocal received
            if received:
                await self.gone.wait()
            if self.gone.is_set():
                return {"type": "http.disconnect"}
            received = True
            return {"type": "http.request", "body": self.body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.heads += 1
                self.status = message["status"]
            else:
                self.answer += message.get("body", b"")
                self.ends += not message.get("more_body", False)

        await app(scope, receive, send)
        return self

    def events(self) -> list[Any]:
        """The server-sent events, parsed."""
        lines = self.answer.decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [json.loads(each) for each in data if each != "[DONE]"]


def call(path: str, body: dict[str, Any]) -> Call:
    """A request with a JSON body."""
    return Call(path, json.dumps(body).encode())
