"""The routes: which body each takes, and how errors look, whoever raised them."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from s1engine import __version__
from s1engine.engine.client import EngineClient
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.server.admission import MAX_QUEUED, Admission, NotAdmitted
from s1engine.server.api.anthropic import MessagesFormatter, MessagesRequest
from s1engine.server.api.openai import ChatFormatter, CompletionFormatter
from s1engine.server.api.request_fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    first_error,
)
from s1engine.server.api.response_formatter import Json, error_object
from s1engine.server.api.responses import ResponsesFormatter, ResponsesRequest
from s1engine.server.api.thinking_fields import EFFORTS
from s1engine.server.api.tools import ToolFields
from s1engine.server.generation import Generation, TimedOut, unknown_model
from s1engine.server.metrics import Metrics
from s1engine.server.middleware import ApiKey, BodyLimit, RequestId
from s1engine.server.tracing import Tracing

CLIENT_CLOSED_REQUEST = 499  # nobody is there to read it; it is for the log
PLAYGROUND = Path(__file__).parent / "playground" / "index.html"


def create_app(
    engine: EngineClient,
    *,
    admission: Admission | None = None,
    api_keys: Sequence[str] = (),
    efforts: Mapping[str, int | None] = EFFORTS,
    timeout: float | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application; it starts and shuts down ``engine``.

    Args:
        admission: who may come in; None: as many as run at once, and MAX_QUEUED.
        api_keys: one of them must be brought as a bearer token; none: nothing is asked for.
        efforts: thinking tokens of each ``reasoning_effort``.
        timeout: seconds that a request may take if it does not say so itself; None: for ever.
        tracing: where spans of requests go; None: nowhere.
    """
    traces = tracing or Tracing()
    admission = admission or Admission(engine.config.max_num_seqs + MAX_QUEUED)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.shutdown()
        await asyncio.to_thread(traces.shutdown)

    app = FastAPI(title="s1engine", version=__version__, lifespan=lifespan)
    server = Server(engine, admission, efforts, timeout, traces)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_api_route("/v1/completions", server.complete, methods=["POST"])
    app.add_api_route("/v1/messages", server.message, methods=["POST"])
    app.add_api_route("/v1/responses", server.respond, methods=["POST"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"])
    app.add_api_route("/v1/requests/{name}/end_thinking", server.end_thinking, methods=["POST"])
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/", server.playground, methods=["GET"], include_in_schema=False)
    app.add_api_route("/version", server.version, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"])
    _add_error_handlers(app)
    app.add_middleware(BodyLimit)
    if api_keys:
        app.add_middleware(ApiKey, keys=api_keys)
    app.add_middleware(RequestId)
    return app


class Server:
    """The handlers, over one engine."""

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        efforts: Mapping[str, int | None],
        timeout: float | None,
        tracing: Tracing,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._compiler = engine.compiler
        self._name = engine.config.model_name
        self._tokenizer = engine.compiler.text.tokenizer
        self._started = int(time.time())
        self._metrics = Metrics(self._name, engine.stats)
        self._generation = Generation(
            engine, admission, self._metrics, efforts=efforts, timeout=timeout, tracing=tracing
        )

    # --- answering ---

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answers a conversation."""
        shape = functools.partial(ChatFormatter, tokenizer=self._tokenizer, body=body)
        return await self._generation.answer(body, http, "chatcmpl-", shape)

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Continues one prompt or several."""
        shape = functools.partial(CompletionFormatter, tokenizer=self._tokenizer, body=body)
        return await self._generation.answer(body, http, "cmpl-", shape)

    async def message(self, body: MessagesRequest, http: Request) -> Response:
        """Answers a conversation in Anthropic's shape."""
        chat = body.chat()
        shape = functools.partial(MessagesFormatter, calls=bool(chat.offered))
        return await self._generation.answer(chat, http, "msg_", shape)

    async def respond(self, body: ResponsesRequest, http: Request) -> Response:
        """Answers in the shape of OpenAI's responses."""
        chat = body.chat()
        shape = functools.partial(ResponsesFormatter, body=body, calls=bool(chat.offered))
        return await self._generation.answer(chat, http, "resp_", shape)

    async def end_thinking(self, name: str) -> Response:
        """Tells a live request, by the id in its answer, to stop thinking and answer now."""
        if not self._engine.end_thinking(name):
            return _error(404, f"there is no live request {name!r}", "not_found_error", "name")
        return JSONResponse({"id": name, "object": "request", "ending": True})

    # --- the rest ---

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._name:
            raise unknown_model(model, self._name)

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The same by its name."""
        self._check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> Json:
        reasoning = self._compiler.text.format
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": "s1engine",
            "max_model_len": self._compiler.max_model_len,
            "reasoning_format": reasoning.name if reasoning else None,
        }

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Ids of a text, or of a chat as it would be answered, thinking opened."""
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        ids = await asyncio.to_thread(self._tokenize, body)
        limit = self._compiler.max_model_len
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": limit})

    def _tokenize(self, body: TokenizeRequest) -> list[int]:
        if body.prompt is not None:
            return self._tokenizer.encode(body.prompt)
        assert body.messages is not None
        tools = ToolFields(tools=body.tools).offered
        return self._compiler.chat_token_ids(body.messages, body.enable_thinking, tools)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Text of ids, special tokens spelled out."""
        self._check_model(body.model)
        limit = self._tokenizer.num_tokens
        if any(not 0 <= token < limit for token in body.tokens):
            raise RequestError(f"tokens must be ids below {limit}", param="tokens")
        text = await asyncio.to_thread(self._tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    async def health(self) -> Response:
        """200 while the engine can step and the server takes requests, else 503."""
        ready = self._engine.healthy and not self._admission.draining
        return Response(status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        """Counters and gauges for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def playground(self) -> Response:
        """The page to play with."""
        return FileResponse(PLAYGROUND)

    async def version(self) -> Response:
        """The version of the engine."""
        return JSONResponse({"version": __version__})


def _error(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    return JSONResponse(error_object(message, kind, param, code), status_code=status)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error as OpenAI's object, whoever raised it."""
    kind = "invalid_request_error"

    async def refused(_: Request, error: Any) -> Response:
        status = 404 if error.code == "model_not_found" else 400
        return _error(status, str(error), kind, error.param, error.code)

    async def malformed(_: Request, error: Any) -> Response:
        found = first_error(error.errors())
        return _error(400, str(found), kind, found.param, found.code)

    async def by_status(_: Request, error: Any) -> Response:
        return _error(error.status_code, str(error.detail), kind)

    async def later(_: Request, error: Any) -> Response:
        answer = _error(error.status, str(error), "overloaded_error", code=error.code)
        answer.headers["retry-after"] = str(error.retry_after)
        return answer

    async def late(_: Request, error: Any) -> Response:
        return _error(504, str(error), "server_error", code="request_timeout")

    async def dead(_: Request, error: Any) -> Response:
        return _error(503, str(error), "server_error", code="engine_dead")

    async def failed(_: Request, error: Any) -> Response:
        return _error(500, str(error), "server_error", code="request_failed")

    async def left(_: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def broken(_: Request, error: Any) -> Response:
        return _error(500, "internal error", "server_error")

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(ValidationError, malformed)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(NotAdmitted, later)
    app.add_exception_handler(TimedOut, late)
    app.add_exception_handler(EngineDeadError, dead)
    app.add_exception_handler(RequestFailedError, failed)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, broken)
