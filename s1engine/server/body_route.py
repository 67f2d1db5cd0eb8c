"""Routes whose large JSON bodies are parsed by one thread, so none delays the event loop for long,
and several follow one another. Knows no schema."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from s1engine.checks import shown
from s1engine.errors import RequestError

JSON_TYPE = "application/json"
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
    """A route of FastAPI whose handler takes ``body``, a model, and maybe ``http``, the request.

    A body goes to model and handler directly, because FastAPI's own way is long. If it is not JSON,
    FastAPI says what is wrong. A large body is parsed by a thread.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        hints = get_type_hints(self.endpoint)
        model: type[BaseModel] = hints["body"]
        takes_request = "http" in hints

        async def handle_body(request: Request) -> Response:
            body = await request.body()
            check_content_type(request.headers.get("content-type", ""))
            if len(body) > LARGE_BODY_BYTES:
                request = ParsedRequest(request, body, await parse(body))
            try:
                value = await request.json()
            except (ValueError, RecursionError):
                return await handle(request)
            arguments = {"http": request} if takes_request else {}
            response: Response = await self.endpoint(model.model_validate(value), **arguments)
            return response

        return handle_body


def check_content_type(given: str) -> None:
    """Raises HTTPException 415 unless a body is said to be JSON."""
    kind = given.partition(";")[0].strip().lower()
    if kind != JSON_TYPE and not (kind.startswith("application/") and kind.endswith("+json")):
        what = f"is {shown(given)}" if given else "is missing"
        raise HTTPException(415, f"the header Content-Type {what}; it must be {JSON_TYPE}")


async def parse(body: bytes) -> Any:
    """Parse a large body. Raises RequestError."""
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(_parser, msgspec.json.decode, body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", param="body") from error
