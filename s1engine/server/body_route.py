"""Routes whose large JSON bodies are parsed by one thread, so none delays the event loop for long,
and several follow one another. Knows no schema."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from s1engine.errors import RequestError

LARGE_BODY_BYTES = 64 * 2**10

_parser = ThreadPoolExecutor(1, "s1engine-json")


class ParsedRequest(Request):
    """The same request, whose body is known and parsed."""

    def __init__(self, request: Request, body: bytes, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._whole = body
        self._parsed = parsed

    async def body(self) -> bytes:
        return self._whole

    async def json(self) -> Any:
        return self._parsed


class BodyRoute(APIRoute):
    """A route of FastAPI; a body above LARGE_BODY_BYTES is parsed before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_large(request: Request) -> Response:
            body = await request.body()
            if len(body) > LARGE_BODY_BYTES:
                request = ParsedRequest(request, body, await parse(body))
            return await handle(request)

        return handle_large


async def parse(body: bytes) -> Any:
    """Parse a large body. Raises RequestError."""
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(_parser, msgspec.json.decode, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", param="body") from error
