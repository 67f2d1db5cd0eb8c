"""The HTTP application: routes, their bodies, and one shape for all errors."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from s1engine import __version__
from s1engine.checks import shown
from s1engine.engine.client import EngineClient
from s1engine.errors import RequestError
from s1engine.server.admission import MAX_QUEUED, Admission, ClientLimits
from s1engine.server.anthropic_errors import AnthropicErrors, asks_for_anthropic
from s1engine.server.api.anthropic import CountTokensRequest, MessagesRequest
from s1engine.server.api.anthropic_formatter import MessagesFormatter
from s1engine.server.api.chat_completions import ChatFormatter, ChatRequest
from s1engine.server.api.completions import CompletionFormatter, CompletionRequest
from s1engine.server.api.response_formatter import Json
from s1engine.server.api.thinking_fields import EFFORTS
from s1engine.server.api.tokenization import DetokenizeRequest, TokenizeRequest
from s1engine.server.body_route import BodyRoute
from s1engine.server.buffer_budget import MAX_BUFFERED_BYTES, BufferBudget
from s1engine.server.docs_page import docs_page
from s1engine.server.error_handlers import add_error_handlers, error_response
from s1engine.server.fair_threads import FairThreadPool
from s1engine.server.generation import Generation, check_model, client_of
from s1engine.server.json_pieces import JsonResponse
from s1engine.server.metrics import Metrics
from s1engine.server.middleware import (
    MAX_BODY_BYTES,
    PAGE_FILES,
    ApiKey,
    BodyLimit,
    NotesHeaders,
    RequestId,
    cors_options,
)
from s1engine.server.response_routes import ResponseRoutes
from s1engine.server.response_store import MAX_STORED_BYTES, ResponseStore
from s1engine.server.streaming import unless_disconnected
from s1engine.server.tracing import Tracing

MAX_TOKENIZING = 2  # requests of /tokenize and /detokenize at once
Handler = Callable[..., Awaitable[Response]]
PLAYGROUND = Path(__file__).parent / "playground"
# The page loads nothing from elsewhere, and a model's text can run nothing.
PAGE_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


def create_app(
    engine: EngineClient,
    *,
    admission: Admission | None = None,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    private_prefixes: bool = False,
    efforts: Mapping[str, int | None] = EFFORTS,
    timeout: float | None = None,
    tracing: Tracing | None = None,
    strict_fields: bool = False,
    allowed_origins: Sequence[str] = (),
    max_stored_bytes: int = MAX_STORED_BYTES,
) -> FastAPI:
    """Return the ASGI application, which starts and shuts down ``engine``.

    Args:
        admission: None: as many sequences as run at once, and MAX_QUEUED waiting ones.
        api_keys: requests must bring one of them as a bearer token; empty: none is needed.
        max_body_bytes: of a request; larger ones are rejected.
        max_buffered_bytes: that clients may fill together.
        private_prefixes: each API key hits only prefixes that it has cached itself. Else the times
            and ``cached_tokens`` of one key depend on what another asked.
        efforts: thinking tokens of each ``reasoning_effort``.
        timeout: default for requests without one, in seconds; None: no limit.
        tracing: records requests; None: no traces.
        strict_fields: a field that is not known is an error; else it is ignored, and named in the
            response's headers and in the log.
        allowed_origins: of web pages that may ask from a browser; ``*``: all.
        max_stored_bytes: of responses that clients may refer to; 0: none is stored.
    """
    traces = tracing or Tracing()
    if admission is None:
        num_clients = max(len(api_keys), 1)
        in_flight = engine.config.max_num_seqs + MAX_QUEUED
        admission = Admission(ClientLimits(max_in_flight=in_flight, num_clients=num_clients))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.shutdown()
        await asyncio.to_thread(traces.shutdown)

    budget = BufferBudget(max_buffered_bytes)
    app = FastAPI(
        title="s1engine", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.router.route_class = BodyRoute
    handlers = Handlers(engine, admission, efforts, timeout, traces, private_prefixes, budget)
    app.add_api_route("/v1/chat/completions", handlers.chat, methods=["POST"])
    app.add_api_route("/v1/completions", handlers.complete, methods=["POST"])
    app.add_api_route("/v1/messages", handlers.message, methods=["POST"])
    app.add_api_route("/v1/messages/count_tokens", handlers.count_tokens, methods=["POST"])
    _add_response_routes(
        app, ResponseRoutes(handlers.generation, ResponseStore(max_stored_bytes), max_body_bytes)
    )
    _add_get(app, "/v1/models", handlers.models)
    _add_get(app, "/v1/models/{name:path}", handlers.model)
    app.add_api_route("/v1/requests/{name}/end_thinking", handlers.end_thinking, methods=["POST"])
    app.add_api_route("/tokenize", handlers.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", handlers.detokenize, methods=["POST"])
    _add_get(app, "/health", handlers.health)
    _add_get(app, "/", handlers.playground, documented=False)
    app.mount(PAGE_FILES, StaticFiles(directory=PLAYGROUND))
    _add_get(app, "/version", handlers.version)
    _add_get(app, "/metrics", handlers.metrics)
    _add_get(app, "/docs", functools.partial(_docs, app), documented=False)
    add_error_handlers(app)
    app.add_middleware(NotesHeaders, strict=strict_fields)
    app.add_middleware(BodyLimit, budget=budget, max_bytes=max_body_bytes)
    if api_keys:
        app.add_middleware(ApiKey, keys=api_keys)
    app.add_middleware(AnthropicErrors)
    app.add_middleware(RequestId)
    if allowed_origins:
        app.add_middleware(CORSMiddleware, **cors_options(allowed_origins))
    return app


def _add_get(app: FastAPI, path: str, handler: Handler, documented: bool = True) -> None:
    app.add_api_route(path, handler, methods=["GET"], include_in_schema=documented)
    app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


async def _docs(app: FastAPI) -> Response:
    return HTMLResponse(docs_page(app.openapi()))


def _add_response_routes(app: FastAPI, routes: ResponseRoutes) -> None:
    one = "/v1/responses/{name}"
    app.add_api_route("/v1/responses", routes.respond, methods=["POST"])
    app.add_api_route(one, routes.retrieve, methods=["GET"])
    app.add_api_route(one, routes.delete, methods=["DELETE"])
    app.add_api_route(f"{one}/input_items", routes.input_items, methods=["GET"])
    app.add_api_route(f"{one}/cancel", routes.cancel, methods=["POST"])


class Handlers:
    """The handlers, over one engine."""

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        efforts: Mapping[str, int | None],
        timeout: float | None,
        tracing: Tracing,
        private_prefixes: bool,
        budget: BufferBudget,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._compiler = engine.compiler
        self._efforts = efforts
        self._names = engine.config.model_names
        self._tokenizer = engine.compiler.text.tokenizer
        self._started = int(time.time())
        # A text of a million characters needs some 200 MB while it is tokenised.
        self._tokenizing = FairThreadPool(MAX_TOKENIZING, "s1engine-tokenize")
        self._metrics = Metrics(
            self._names[0], engine.stats, lambda: admission.in_flight, lambda: budget.used
        )
        self.generation = Generation(
            engine,
            admission,
            self._metrics,
            efforts=efforts,
            timeout=timeout,
            tracing=tracing,
            private_prefixes=private_prefixes,
        )

    # --- answering ---

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        body.use_tool_format(self.generation.tool_format)
        formatter = functools.partial(ChatFormatter, tokenizer=self._tokenizer, body=body)
        return await self.generation.generate_response(body, http, "chatcmpl-", formatter)

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Continue one or several prompts."""
        formatter = functools.partial(CompletionFormatter, tokenizer=self._tokenizer, body=body)
        return await self.generation.generate_response(body, http, "cmpl-", formatter)

    async def message(self, body: MessagesRequest, http: Request) -> Response:
        """Answer a conversation in Anthropic's format."""
        chat = body.to_chat()
        chat.use_tool_format(self.generation.tool_format)
        formatter = functools.partial(
            MessagesFormatter,
            parser=chat.create_parser(),
            shows_thinking=body.shows_thinking,
        )
        return await self.generation.generate_response(chat, http, "msg_", formatter)

    async def count_tokens(self, body: CountTokensRequest, http: Request) -> Response:
        """Count the tokens of the prompt that a message would have."""
        check_model(body.model, self._names)
        work = self._tokenizing.run(client_of(http), self._count_tokens, body)
        return await unless_disconnected(http.receive, work)

    def _count_tokens(self, body: CountTokensRequest) -> Response:
        return JSONResponse({"input_tokens": len(self._chat_token_ids(body.to_chat()))})

    async def end_thinking(self, name: str) -> Response:
        """Make a live request, named by the id in its response, stop thinking and answer now."""
        if not self._engine.end_thinking(name):
            return error_response(
                404, f"there is no live request {shown(name)}", "not_found_error", "name"
            )
        return JSONResponse({"id": name, "object": "request", "ending": True})

    # --- the rest ---

    async def models(self, http: Request) -> Response:
        """List the served model, once for each of its names."""
        models = [self._model(name, http) for name in self._names]
        ends = {"first_id": self._names[0], "last_id": self._names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": models, **ends})

    async def model(self, name: str, http: Request) -> Response:
        """Describe the served model by one of its names."""
        check_model(name, self._names)
        return JSONResponse(self._model(name, http))

    def _model(self, name: str, http: Request) -> Json:
        thinking = self._compiler.text.thinking
        if asks_for_anthropic(http.scope):
            created = datetime.fromtimestamp(self._started, UTC).isoformat()
            return {"type": "model", "id": name, "display_name": name, "created_at": created}
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "s1engine",
            "max_model_len": self._compiler.max_model_len,
            "reasoning_format": thinking.format.name if thinking.format else None,
            "thinks_by_default": thinking.by_default,
        }

    async def tokenize(self, body: TokenizeRequest, http: Request) -> Response:
        """Tokenize a text, or a chat as the engine would get it, with the thinking opened."""
        check_model(body.model, self._names)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        work = self._tokenizing.run(client_of(http), self._tokenize, body)
        return await unless_disconnected(http.receive, work)

    def _tokenize(self, body: TokenizeRequest) -> Response:
        ids = self._token_ids(body)
        limit = self._compiler.max_model_len
        answer: Json = {"tokens": ids, "count": len(ids), "max_model_len": limit}
        if body.return_token_strs:
            answer["token_strs"] = [*map(self._tokenizer.token_string, ids)]
        return JsonResponse(answer)

    def _token_ids(self, body: TokenizeRequest) -> list[int]:
        if body.prompt is not None:
            plain = body.add_special_tokens is False
            return (self._tokenizer.encode if plain else self._tokenizer.encode_prompt)(body.prompt)
        return self._chat_token_ids(body.to_chat())

    def _chat_token_ids(self, chat: ChatRequest) -> list[int]:
        """The prompt that the engine would get. Raises RequestError."""
        try:
            options = chat.options(self._efforts)
            budget, _ = chat.requested_thinking(self._efforts)
            return self._compiler.chat_token_ids(
                chat.messages,
                options["enable_thinking"],
                chat.offered,
                options["template_kwargs"],
                budget,
            )
        except RequestError as error:
            raise chat.renamed_error(error) from error

    async def detokenize(self, body: DetokenizeRequest, http: Request) -> Response:
        """Return the text of token ids, special tokens included."""
        check_model(body.model, self._names)
        limit = self._tokenizer.num_tokens
        if any(not 0 <= token < limit for token in body.tokens):
            raise RequestError(f"tokens must be ids below {limit}", param="tokens")
        decode = self._tokenizer.decode
        work = self._tokenizing.run(client_of(http), decode, body.tokens, False)
        return JsonResponse({"prompt": await unless_disconnected(http.receive, work)})

    async def health(self) -> Response:
        """200 while the engine can step and the server accepts requests, else 503."""
        ready = self._engine.healthy and not self._admission.draining
        return Response(status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        """Return counters and gauges for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def playground(self) -> Response:
        """Return the playground page."""
        headers = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer"}
        return FileResponse(PLAYGROUND / "index.html", headers=headers)

    async def version(self) -> Response:
        """Return the engine's version."""
        return JSONResponse({"version": __version__})
