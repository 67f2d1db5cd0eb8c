"""From a parsed body to the engine, and back as one object or as a stream of events.

A request is compiled and admitted before its response begins, so its mistakes become an HTTP
status; later errors become an event in the stream. Compiling, mostly tokenisation, runs in a
thread: the event loop carries every request's tokens and must not block.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from fastapi import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from s1engine.engine.client import EngineClient
from s1engine.engine.request import Request
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.server.admission import Admission, NotAdmitted, Ticket
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.completions import CompletionRequest
from s1engine.server.api.response_formatter import ResponseFormatter, ResponseHead
from s1engine.server.fair_threads import FairThreadPool
from s1engine.server.metrics import Metrics
from s1engine.server.streaming import (
    DeferredResponse,
    EventStream,
    merge,
    unless_disconnected,
)
from s1engine.server.tracing import RequestTrace, Tracing

IndexedEvents = AsyncGenerator[tuple[int, Any], None]  # each with the index of its prompt

MAX_GRAMMARS = 2  # checked at once
MAX_COMPILING = 8  # other requests at once
NO_CLIENT = ""  # if there are no API keys

logger = logging.getLogger(__name__)


class RequestTimeoutError(Exception):
    """A request took longer than its timeout."""


class Generation:
    """Generates the responses to HTTP requests, over one engine.

    Args:
        efforts: thinking tokens of each ``reasoning_effort``.
        timeout: default for requests without one, in seconds; None: no limit.
        tracing: records each admitted request.
        private_prefixes: each API key has its own cached prefixes.
    """

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        metrics: Metrics,
        *,
        efforts: Mapping[str, int | None],
        timeout: float | None,
        tracing: Tracing,
        private_prefixes: bool,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._efforts = efforts
        self._timeout = timeout
        self._tracing = tracing
        self._private_prefixes = private_prefixes
        self._defaults = engine.compiler.default_sampling()
        # Checking a grammar may take a second, so these requests have threads of their own.
        self._grammar_pool = FairThreadPool(MAX_GRAMMARS, "s1engine-grammar")
        self._pool = FairThreadPool(MAX_COMPILING, "s1engine-compile")

    async def generate_response(
        self,
        body: ChatRequest | CompletionRequest,
        http: HttpRequest,
        prefix: str,
        create_formatter: Callable[[ResponseHead, int], ResponseFormatter],
    ) -> Response:
        """Return the response to one HTTP request, which admits and generates it while it is sent.

        Raises errors that become its status; so does the response, before its first byte.

        Args:
            prefix: of the response's id.
            create_formatter: of the response's head and the number of samples.
        """
        if not self._engine.healthy:
            raise EngineDeadError("the engine is not running")
        name = f"{prefix}{uuid.uuid4().hex}"
        return DeferredResponse(partial(self._respond, body, http, name, create_formatter))

    async def _respond(
        self,
        body: ChatRequest | CompletionRequest,
        http: HttpRequest,
        name: str,
        create_formatter: Callable[[ResponseHead, int], ResponseFormatter],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Admit the request, compile it, generate it and send the response.

        What a request registers lives in the ``with`` blocks, so it ends with them, whatever
        happens.
        """
        arrival = time.monotonic()
        operation = "chat" if isinstance(body, ChatRequest) else "text_completion"
        seconds = body.timeout if body.timeout is not None else self._timeout
        with ExitStack() as stack:
            ticket = stack.enter_context(self._admitted(http, body, name))
            pool = self._grammar_pool if body.has_grammar else self._pool
            compiling = pool.run(ticket.client, self._compile, body, name, arrival)
            requests = await unless_disconnected(receive, compiling)
            self._set_shares(requests, ticket)
            head = ResponseHead(name, int(time.time()), self._engine.config.model_name)
            formatter = create_formatter(head, requests[0].params.n)
            trace = stack.enter_context(
                self._tracing.begin(operation, http.headers, head, requests)
            )
            events = self._generate(requests, ticket, trace, seconds)
            if body.stream:
                await EventStream(self._stream(events, formatter))(scope, receive, send)
                return
            collecting = self._collect_outputs(events, len(requests))
            outputs = await unless_disconnected(receive, collecting)
        await json_response(formatter.format_response(outputs))(scope, receive, send)

    def _compile(
        self, body: ChatRequest | CompletionRequest, name: str, arrival: float
    ) -> list[Request]:
        """Compile one engine request for each prompt, named ``name`` or, if several, ``name-i``."""
        model = self._engine.config.model_name
        if body.model is not None and body.model != model:
            raise unknown_model(body.model, model)
        options = {**body.options(self._efforts), "stream": body.stream}
        prompts = body.prompts()
        names = [name] if len(prompts) == 1 else [f"{name}-{i}" for i in range(len(prompts))]
        compiler = self._engine.compiler
        try:
            params = body.sampling_params(self._defaults, self._efforts)
            return [
                compiler.compile(prompt, params, request_id=own, arrival=arrival, **options)
                for prompt, own in zip(prompts, names, strict=True)
            ]
        except RequestError as error:
            raise body.renamed_error(error) from error

    @contextlib.contextmanager
    def _admitted(
        self, http: HttpRequest, body: ChatRequest | CompletionRequest, name: str
    ) -> Iterator[Ticket]:
        """Admit a request until the block ends. Raises NotAdmitted and RequestError."""
        ticket = self._admit(client_of(http), body)
        try:
            yield ticket
        finally:
            self._admission.release(ticket)
            logger.debug("request %s: ended, %s tokens used", name, ticket.used)

    def _admit(self, client: str, body: ChatRequest | CompletionRequest) -> Ticket:
        limits = self._admission.limits
        try:
            limits.check_priority(client, body.priority)
            return self._admission.admit(client, body.num_sequences(limits.largest_request))
        except (NotAdmitted, RequestError) as refused:
            self._metrics.count_refused(refused.code or "invalid_request")
            raise

    def _set_shares(self, requests: Sequence[Request], ticket: Ticket) -> None:
        """Set what the requests have from their client: their order, and the salt."""
        self._admission.set_order(ticket, sum(len(request.prompt) for request in requests))
        for request in requests:
            request.order = ticket.start
            if self._private_prefixes:
                salted = ticket.client.encode() + request.salt
                request.salt = hashlib.sha256(salted).digest()[:16]
        logger.debug(
            "request %s: prompts of %s tokens, at most %d sequences of %s tokens",
            requests[0].request_id,
            [len(request.prompt) for request in requests],
            ticket.sequences,
            requests[0].params.max_tokens,
        )

    async def _generate(
        self,
        requests: Sequence[Request],
        ticket: Ticket,
        trace: RequestTrace,
        seconds: float | None,
    ) -> IndexedEvents:
        """Yield the events of all requests with their index.

        Raises RequestTimeoutError, EngineDeadError and RequestFailedError.
        """
        used = 0
        events: IndexedEvents = merge(
            [self._engine.generate_request(request) for request in requests]
        )
        if seconds is not None:
            events = _with_timeout(events, seconds)
        try:
            async with contextlib.aclosing(events):
                async for i, event in events:
                    self._admission.record_start(ticket)
                    if isinstance(event, RequestOutput):
                        self._metrics.observe(event)
                        trace.observe(event)
                        used += event.usage.prompt_tokens + event.usage.completion_tokens
                    yield i, event
        except BaseException as error:  # a disconnect is one too
            if isinstance(error, RequestFailedError):
                self._metrics.count_refused("request_failed")
            trace.fail(error)
            raise
        ticket.used = used

    async def _collect_outputs(self, events: IndexedEvents, count: int) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(events):
            async for i, event in events:
                if isinstance(event, RequestOutput):
                    outputs[i] = event
        return [outputs[i] for i in range(count)]

    async def _stream(
        self, events: IndexedEvents, formatter: ResponseFormatter
    ) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: for each chunk, then for the end or an error."""
        finished: list[RequestOutput] = []
        for line in formatter.begin_events():
            yield line
        try:
            async with contextlib.aclosing(events):
                async for i, event in events:
                    if isinstance(event, RequestOutput):
                        finished.append(event)
                    else:
                        for line in formatter.chunk_events(i, event):
                            yield line
            last = formatter.end_events(finished)
        except EngineDeadError as error:
            last = formatter.error_events(str(error), "engine_dead")
        except RequestFailedError as error:
            last = formatter.error_events(str(error), "request_failed")
        except RequestTimeoutError as error:
            last = formatter.error_events(str(error), "request_timeout")
        for line in last:
            yield line


async def _with_timeout(events: IndexedEvents, seconds: float) -> IndexedEvents:
    """Yield the same events. Raises RequestTimeoutError."""
    deadline = asyncio.get_running_loop().time() + seconds
    async with contextlib.aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise RequestTimeoutError(f"the request took longer than {seconds:g} s") from error
            yield event


def client_of(http: HttpRequest) -> str:
    """Return the number of the request's API key; NO_CLIENT if there are none."""
    client: str = http.scope.get("state", {}).get("client", NO_CLIENT)
    return client


def unknown_model(asked: str, served: str) -> RequestError:
    """Return the error for a name that is not the served model's."""
    return RequestError(
        f"the model {asked!r} does not exist; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


def json_response(value: Any) -> Response:
    """Return a response of one JSON value."""
    body = msgspec.json.encode(value)
    return Response(body, media_type="application/json")
