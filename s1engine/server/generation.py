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
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from s1engine.checks import shown
from s1engine.engine.client import EngineClient
from s1engine.engine.grammar_limits import MAX_TRIALS
from s1engine.engine.grammar_validator import UntriedGrammarError
from s1engine.engine.request import Request
from s1engine.errors import (
    EngineDeadError,
    RequestError,
    RequestFailedError,
    ShuttingDownError,
    TryAgainError,
)
from s1engine.outputs import RequestOutput
from s1engine.server.admission import RETRY_AFTER_S, Admission, NotAdmitted, Ticket
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.completions import CompletionRequest
from s1engine.server.api.response_formatter import ResponseFormatter, ResponseHead
from s1engine.server.fair_threads import FairThreadPool
from s1engine.server.json_pieces import JsonResponse
from s1engine.server.logprob_limit import reserve_logprobs
from s1engine.server.metrics import Metrics
from s1engine.server.streaming import (
    DeferredResponse,
    EventStream,
    merge,
    unless_disconnected,
)
from s1engine.server.tracing import RequestTrace, Tracing

T = TypeVar("T")
IndexedEvents = AsyncGenerator[tuple[int, Any], None]  # each with the index of its prompt

MAX_COMPILING = 8  # requests at once
MAX_TRIALS_OF_CLIENT = MAX_TRIALS // 2  # grammars tried at once
NO_CLIENT = "0"  # if there are no API keys

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
        self.tool_format = engine.compiler.text.tool_format
        self._pool = FairThreadPool(MAX_COMPILING, "s1engine-compile")
        # A trial of a grammar may take two seconds, so it has threads of its own.
        self._trial_pool = FairThreadPool(
            MAX_TRIALS, "s1engine-trial", max_per_client=MAX_TRIALS_OF_CLIENT
        )

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
            compiling = self._compile_in_turn(ticket.client, body, name, arrival)
            requests = await unless_disconnected(receive, _in_time(compiling, arrival, seconds))
            body.note_lowered(min(request.max_len - len(request.prompt) for request in requests))
            reserve_logprobs(requests, scope["state"]["lease"])
            self._set_shares(requests, ticket)
            prompt_tokens = sum(len(request.prompt) for request in requests)
            model = self._engine.config.model_name
            head = ResponseHead(name, int(time.time()), model, prompt_tokens)
            formatter = create_formatter(head, requests[0].params.n)
            trace = stack.enter_context(
                self._tracing.begin(operation, http.headers, head, requests)
            )
            events = self._generate(requests, trace, arrival, seconds)
            if body.stream:
                await EventStream(self._stream(events, formatter))(scope, receive, send)
                return
            collecting = self._collect_outputs(events, len(requests))
            outputs = await unless_disconnected(receive, collecting)
        await JsonResponse(formatter.format_response(outputs))(scope, receive, send)

    async def _compile_in_turn(
        self, client: str, body: ChatRequest | CompletionRequest, name: str, arrival: float
    ) -> list[Request]:
        """Compile in a thread; try a new grammar before, in another. Raises NotAdmitted if that
        decides nothing."""
        while True:
            try:
                return await self._pool.run(client, self._compile, body, name, arrival)
            except UntriedGrammarError as untried:
                grammar, param = untried.grammar, untried.param
            validate = self._engine.compiler.grammars.validator.validate
            try:
                with contextlib.suppress(RequestError):  # raised again by the next attempt
                    await self._trial_pool.run(client, validate, grammar, param)
            except TryAgainError as error:
                code = "grammar_not_checked"
                self._metrics.count_refused(code)
                raise NotAdmitted(
                    str(error), status=503, code=code, retry_after=RETRY_AFTER_S
                ) from error

    def _compile(
        self, body: ChatRequest | CompletionRequest, name: str, arrival: float
    ) -> list[Request]:
        """Compile one engine request for each prompt, named ``name`` or, if several, ``name-i``."""
        check_model(body.model, self._engine.config.model_names)
        prompts = body.prompts()
        names = [name] if len(prompts) == 1 else [f"{name}-{i}" for i in range(len(prompts))]
        compiler = self._engine.compiler
        try:
            options = {**body.options(self._efforts), "stream": body.stream}
            options["arrival"], options["try_grammar"] = arrival, False
            params = body.sampling_params(self._defaults, self._efforts)
            return [
                compiler.compile(prompt, params, request_id=own, **options)
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
            logger.debug("request %s: ended", name)

    def _admit(self, client: str, body: ChatRequest | CompletionRequest) -> Ticket:
        limits = self._admission.limits
        try:
            limits.check_priority(client, body.priority)
            return self._admission.admit(client, body.num_sequences(limits.largest_request))
        except (NotAdmitted, RequestError) as refused:
            self._metrics.count_refused(refused.code or "invalid_request")
            raise

    def _set_shares(self, requests: Sequence[Request], ticket: Ticket) -> None:
        """Set what the requests have from their client: its share of the engine, and the salt."""
        for request in requests:
            request.client = int(ticket.client)
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
        trace: RequestTrace,
        arrival: float,
        seconds: float | None,
    ) -> IndexedEvents:
        """Yield the events of all requests with their index.

        Raises RequestTimeoutError, EngineDeadError and RequestFailedError.
        """
        events: IndexedEvents = merge(
            [self._engine.generate_request(request) for request in requests]
        )
        if seconds is not None:
            events = _with_timeout(events, arrival, seconds)
        try:
            async with contextlib.aclosing(events):
                async for i, event in events:
                    if isinstance(event, RequestOutput):
                        self._metrics.observe(event)
                        trace.observe(event)
                    yield i, event
        except BaseException as error:  # a disconnect is one too
            if isinstance(error, RequestFailedError):
                self._metrics.count_refused("request_failed")
            self._metrics.count_aborted(_reason(error))
            trace.fail(error)
            raise

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
            ends = isinstance(error, ShuttingDownError)
            last = formatter.error_events(str(error), "shutdown" if ends else "engine_dead")
        except RequestFailedError as error:
            last = formatter.error_events(str(error), "request_failed")
        except RequestTimeoutError as error:
            last = formatter.error_events(str(error), "request_timeout")
        for line in last:
            yield line


def _reason(error: BaseException) -> str:
    """Why a running request has no output, for the metrics."""
    if isinstance(error, RequestTimeoutError):
        return "timeout"
    if isinstance(error, ShuttingDownError):
        return "shutdown"
    if isinstance(error, EngineDeadError | RequestFailedError):
        return "engine"
    return "disconnect"  # the request was cancelled


async def _in_time(work: Coroutine[Any, Any, T], arrival: float, seconds: float | None) -> T:
    """Return the result of ``work``. Raises RequestTimeoutError ``seconds`` after ``arrival``."""
    if seconds is None:
        return await work
    try:
        async with asyncio.timeout_at(arrival + seconds):
            return await work
    except TimeoutError as error:
        raise RequestTimeoutError(f"the request took longer than {seconds:g} s") from error


async def _with_timeout(events: IndexedEvents, arrival: float, seconds: float) -> IndexedEvents:
    """Yield the same events. Raises RequestTimeoutError ``seconds`` after ``arrival``."""
    deadline = arrival + seconds  # the loop's clock is monotonic() too
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


def check_model(asked: str | None, served: Sequence[str]) -> None:
    """Raises RequestError for a name that is none of the served model's."""
    if asked is not None and asked not in served:
        raise RequestError(
            f"the model {shown(asked)} does not exist; this server has {', '.join(served)}",
            param="model",
            code="model_not_found",
        )
