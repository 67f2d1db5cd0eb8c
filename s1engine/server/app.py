"""The routes: from a checked body to the engine, and back as one object or as a stream of events.

A request is compiled before its answer begins, so whatever is wrong with it is an HTTP status; what
goes wrong later is an event in the stream. Compiling (tokenising above all) happens in a thread:
nothing here may hold up the loop on which everybody's tokens travel.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from s1engine import __version__
from s1engine.engine import request as engine_request
from s1engine.engine.served import ServedEngine
from s1engine.errors import EngineDeadError, RequestError
from s1engine.outputs import RequestOutput
from s1engine.server import answers
from s1engine.server.metrics import Metrics
from s1engine.server.middleware import ApiKey, BodyLimit
from s1engine.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    first_error,
)
from s1engine.server.streaming import EventStream, merge, unless_disconnected
from s1engine.server.thinking import EFFORTS

Body = ChatRequest | CompletionRequest
CLIENT_CLOSED_REQUEST = 499  # nobody is there to read it; it is for the log
DONE = b"[DONE]"
PLAYGROUND = Path(__file__).parent / "playground" / "index.html"


def create_app(
    engine: ServedEngine,
    *,
    api_key: str | None = None,
    efforts: Mapping[str, int | None] = EFFORTS,
) -> FastAPI:
    """The ASGI application; it starts and shuts down ``engine``.

    Args:
        api_key: what clients must bring as a bearer token; None: nothing.
        efforts: thinking tokens of each ``reasoning_effort``.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.shutdown()

    app = FastAPI(title="s1engine", version=__version__, lifespan=lifespan)
    server = Server(engine, efforts)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_api_route("/v1/completions", server.complete, methods=["POST"])
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
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    return app


class Server:
    """The handlers, over one engine."""

    def __init__(self, engine: ServedEngine, efforts: Mapping[str, int | None]) -> None:
        self._engine = engine
        self._efforts = efforts
        self._compiler = engine.compiler
        self._name = engine.config.model_name
        self._defaults = engine.compiler.text.default_sampling()
        self._tokenizer = engine.compiler.text.tokenizer
        self._started = int(time.time())
        self._metrics = Metrics(self._name, engine.stats)

    # --- answering ---

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answers a conversation."""
        shape = answers.ChatAnswers(self._tokenizer, token_ids=body.return_token_ids)
        return await self._answer(body, http, shape, "chatcmpl")

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Continues one prompt or several."""
        shape = answers.CompletionAnswers(self._tokenizer, token_ids=body.return_token_ids)
        return await self._answer(body, http, shape, "cmpl")

    async def _answer(
        self, body: Body, http: Request, shape: answers.Answers, prefix: str
    ) -> Response:
        self._check_model(body.model)
        name = f"{prefix}-{uuid.uuid4().hex}"
        requests = await asyncio.to_thread(self._compile, body, name)
        head = {"id": name, "created": int(time.time()), "model": self._name}
        if body.stream:
            return EventStream(self._events(body, requests, head, shape))
        outputs = await unless_disconnected(http.receive, self._finish(requests))
        choices = [
            shape.choice(i * len(output.outputs) + sample.index, sample)
            for i, output in enumerate(outputs)
            for sample in output.outputs
        ]
        answer = {**head, "object": shape.kind, "choices": choices, "usage": answers.usage(outputs)}
        checkpoints = [
            shape.checkpoint(i * len(output.outputs), checkpoint)
            for i, output in enumerate(outputs)
            for checkpoint in output.checkpoints
        ]
        return JSONResponse(answer | ({"checkpoints": checkpoints} if checkpoints else {}))

    def _compile(self, body: Body, name: str) -> list[engine_request.Request]:
        """One engine request a prompt; ``name/i`` for all but a single one."""
        params = body.sampling_params(self._defaults, self._efforts)
        options = body.options(self._efforts)
        prompts = body.prompts()
        names = [name] if len(prompts) == 1 else [f"{name}-{i}" for i in range(len(prompts))]
        return [
            self._compiler.compile(
                prompt, params, request_id=own, stream=body.stream, **options
            )
            for prompt, own in zip(prompts, names, strict=True)
        ]

    async def _finish(self, requests: list[engine_request.Request]) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        streams = [self._engine.run(request) for request in requests]
        async with contextlib.aclosing(merge(streams)) as events:
            async for i, event in events:
                if isinstance(event, RequestOutput):
                    self._metrics.observe(event)
                    outputs[i] = event
        return [outputs[i] for i in range(len(requests))]

    async def _events(
        self,
        body: Body,
        requests: list[engine_request.Request],
        head: answers.Json,
        shape: answers.Answers,
    ) -> AsyncGenerator[bytes, None]:
        """Payloads of a stream: a chunk for each step of each sample, usage if asked, the end."""
        kind = {"object": f"{shape.kind}.chunk" if shape.kind == "chat.completion" else shape.kind}
        head = {**head, **kind}
        finished: list[RequestOutput] = []
        n = requests[0].params.n
        try:
            streams = [self._engine.run(request) for request in requests]
            async with contextlib.aclosing(merge(streams)) as events:
                async for i, event in events:
                    if isinstance(event, RequestOutput):
                        self._metrics.observe(event)
                        finished.append(event)
                    else:
                        yield _json({**head, **shape.event(i * n, event)})
            if body.includes_usage:
                yield _json({**head, "choices": [], "usage": answers.usage(finished)})
        except EngineDeadError as error:
            yield _json(answers.error_object(str(error), "server_error", code="engine_dead"))
        yield DONE

    async def end_thinking(self, name: str) -> Response:
        """Tells a live request, by the id in its answer, to stop thinking and answer now."""
        if not self._engine.end_thinking(name):
            return _error(404, f"there is no live request {name!r}", "not_found_error", "name")
        return JSONResponse({"id": name, "object": "request", "ending": True})

    # --- the rest ---

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._name:
            raise RequestError(
                f"the model {model!r} does not exist; this server has {self._name!r}",
                param="model",
                code="model_not_found",
            )

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The same by its name."""
        self._check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> answers.Json:
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
        return self._compiler.chat_token_ids(body.messages, body.enable_thinking)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Text of ids, special tokens spelled out."""
        self._check_model(body.model)
        limit = self._tokenizer.num_tokens
        if any(not 0 <= token < limit for token in body.tokens):
            raise RequestError(f"tokens must be ids below {limit}", param="tokens")
        text = await asyncio.to_thread(self._tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    async def health(self) -> Response:
        """200 while the engine can step, 503 once it cannot."""
        return Response(status_code=200 if self._engine.healthy else 503)

    async def metrics(self) -> Response:
        """Counters and gauges for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def playground(self) -> Response:
        """The page to play with."""
        return FileResponse(PLAYGROUND)

    async def version(self) -> Response:
        """The version of the engine."""
        return JSONResponse({"version": __version__})


def _json(value: answers.Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _error(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    return JSONResponse(answers.error_object(message, kind, param, code), status_code=status)


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

    async def dead(_: Request, error: Any) -> Response:
        return _error(503, str(error), "server_error", code="engine_dead")

    async def left(_: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def broken(_: Request, error: Any) -> Response:
        return _error(500, "internal error", "server_error")

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(EngineDeadError, dead)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, broken)
