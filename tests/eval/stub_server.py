"""A small OpenAI-compatible server that answers, fails or delays as a test defines."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answerer = Callable[[dict[str, Any]], Any]
"""Request body to response body, or to (status, headers, body)."""


class StubServer:
    """A server with its address, and the requests it received."""

    def __init__(self, answer: Answerer, models: bool) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._answer = answer
        self.models = models
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator["StubServer"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self._answer(body)
        finally:
            with self._lock:
                self._now -= 1

    def _handler(stub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                listed = {"data": [{"id": "stub-model"}]}
                self._send(*((200, {}, listed) if stub.models else (404, {}, {})))

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                found = stub.reply(json.loads(raw), dict(self.headers))
                self._send(*(found if isinstance(found, tuple) else (200, {}, found)))

            def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        return Handler


@contextmanager
def serving(answer: Answerer, *, models: bool = True) -> Iterator[StubServer]:
    with StubServer(answer, models).running() as server:
        yield server


def completion(*texts: str, tokens: int = 20, thinking: int | None = None) -> dict[str, Any]:
    """A chat completion in OpenAI's format."""
    usage: dict[str, Any] = {"completion_tokens": tokens}
    if thinking is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": usage}
