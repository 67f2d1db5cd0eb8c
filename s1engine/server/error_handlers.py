"""Errors of the application as responses of one shape, OpenAI's, each with a line in the log."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from s1engine.checks import shown
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.server.admission import NotAdmitted
from s1engine.server.anthropic_errors import asks_for_anthropic, rewrite
from s1engine.server.api.request_fields import first_error
from s1engine.server.api.response_formatter import error_object
from s1engine.server.generation import RequestTimeoutError

STATUS = {"model_not_found": 404, "priority_not_allowed": 403}  # of a RequestError; others: 400
RESTART_RETRY_AFTER_S = 5  # until another engine may run
CLIENT_CLOSED_REQUEST = 499  # for the log: no client reads it
MAX_LOGGED_CHARS = 300  # of an error's message
INVALID = "invalid_request_error"

logger = logging.getLogger(__name__)


def error_response(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """Return an error object with its status."""
    return JSONResponse(error_object(message, kind, param, code), status_code=status)


def add_error_handlers(app: FastAPI) -> None:
    """Return every error as OpenAI's error object, and log why."""

    def respond(http: Request, status: int, error: object, *fields: Any) -> JSONResponse:
        _log(http, status, str(error))
        return error_response(status, str(error), *fields)

    async def refused(http: Request, error: Any) -> Response:
        status = STATUS.get(error.code, 400)
        return respond(http, status, error, INVALID, error.param, error.code)

    async def malformed(http: Request, error: Any) -> Response:
        first = first_error(error.errors())
        return respond(http, 400, first, INVALID, first.param, first.code)

    async def by_status(http: Request, error: Any) -> Response:
        message = error.detail
        if error.status_code in (404, 405):
            message = _without_route(app, http, error.status_code)
        answer = respond(http, error.status_code, message, INVALID)
        answer.headers.update(error.headers or {})
        return answer

    async def later(http: Request, error: Any) -> Response:
        answer = respond(http, error.status, error, "overloaded_error", None, error.code)
        answer.headers["retry-after"] = str(error.retry_after)
        return answer

    async def late(http: Request, error: Any) -> Response:
        return respond(http, 504, error, "server_error", None, "request_timeout")

    async def dead(http: Request, error: Any) -> Response:
        answer = respond(http, 503, error, "server_error", None, "engine_dead")
        answer.headers["retry-after"] = str(RESTART_RETRY_AFTER_S)
        return answer

    async def failed(http: Request, error: Any) -> Response:
        return respond(http, 500, error, "server_error", None, "request_failed")

    async def left(_: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def broken(http: Request, error: Any) -> Response:
        answer = error_response(500, "internal error", "server_error")
        if not asks_for_anthropic(http.scope):
            return answer
        name = http.scope.get("state", {}).get("request_id", "")  # outside of the middleware
        return Response(rewrite(bytes(answer.body), 500, name), 500, media_type="application/json")

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(ValidationError, malformed)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(NotAdmitted, later)
    app.add_exception_handler(RequestTimeoutError, late)
    app.add_exception_handler(EngineDeadError, dead)
    app.add_exception_handler(RequestFailedError, failed)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, broken)


def _log(http: Request, status: int, message: str) -> None:
    name = http.scope.get("state", {}).get("request_id", "-")
    path = shown(http.url.path)
    text = message[:MAX_LOGGED_CHARS].encode("unicode_escape").decode()
    logger.warning(
        "request %s: %s %s is refused with %d: %s", name, http.method, path, status, text
    )


def _without_route(app: FastAPI, http: Request, status: int) -> str:
    """Say that a path or its method has no route, and which there are."""
    methods = _routes(app)
    path = http.url.path.rstrip("/") or "/"
    if status == 405 and path in methods:
        return f"{shown(path)} is for {' and '.join(sorted(methods[path]))}, not {http.method}"
    meant = [known for known in (f"/v1{path}", path.replace("/v1/v1/", "/v1/")) if known in methods]
    hint = f"; did you mean {meant[0]}?" if meant else f". Routes: {', '.join(sorted(methods))}"
    return f"there is no route {http.method} {shown(path)}{hint}"


def _routes(app: FastAPI) -> dict[str, set[str]]:
    """The methods of each documented path."""
    return {
        path: {method.upper() for method in operations}
        for path, operations in app.openapi()["paths"].items()
    }
