"""From a checked body to the engine, and back as one object or as a stream of events.

A request is compiled and admitted before its answer begins, so whatever is wrong with it is an HTTP
status; what goes wrong later is an event in the stream. Compiling (tokenising above all) happens in
a thread: nothing here may hold up the loop on which everybody's tokens travel.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import Request as HttpRequest
from starlette.responses import Response

from s1engine.engine.client import EngineClient
from s1engine.engine.request import Request
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.server.admission import Admission, NotAdmitted, Ticket
from s1engine.server.api.request_fields import ChatRequest, CompletionRequest
from s1engine.server.api.response_formatter import Head, ResponseFormatter
from s1engine.server.metrics import Metrics
from s1engine.server.streaming import EventStream, merge, unless_disconnected
from s1engine.server.tracing import Trace, Tracing

Run = AsyncGenerator[tuple[int, Any], None]  # events, each with the index of its prompt

MAX_GRAMMARS = 2  # that are checked at once
NO_CLIENT = ""  # where no API key tells clients apart


class TimedOut(Exception):
    """A request took longer than it may."""


class Generation:
    """Answers bodies, over one engine.

    Args:
        efforts: thinking tokens of each ``reasoning_effort``.
        timeout: seconds that a request may take if it does not say so itself; None: for ever.
        tracing: told of each request that was let in.
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
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._efforts = efforts
        self._timeout = timeout
        self._tracing = tracing
        self._defaults = engine.compiler.text.default_sampling()
        # Grammars may take a second to check: those who ask for them wait for each other alone.
        self._slow = ThreadPoolExecutor(MAX_GRAMMARS, "s1engine-compile")

    async def answer(
        self,
        body: ChatRequest | CompletionRequest,
        http: HttpRequest,
        prefix: str,
        shape: Callable[[Head, int], ResponseFormatter],
    ) -> Response:
        """Answers one HTTP request. Raises what becomes its status."""
        if not self._engine.healthy:
            raise EngineDeadError("the engine is not running")
        name = f"{prefix}{uuid.uuid4().hex}"
        pool = self._slow if body.has_grammar else None
        loop = asyncio.get_running_loop()
        requests = await loop.run_in_executor(pool, self._compile, body, name)
        samples = requests[0].params.n
        head = Head(name, int(time.time()), self._engine.config.model_name)
        answers = shape(head, samples)
        ticket = self._enter(http, requests)
        operation = "chat" if isinstance(body, ChatRequest) else "text_completion"
        trace = self._tracing.begin(operation, http.headers, head, requests)
        seconds = body.timeout if body.timeout is not None else self._timeout
        run = self._run(requests, ticket, trace, seconds)

        def done() -> None:
            self._admission.leave(ticket)
            trace.end()

        if body.stream:
            return EventStream(self._events(run, answers), done)
        try:
            outputs = await unless_disconnected(http.receive, self._finish(run, len(requests)))
        finally:
            done()
        return json_response(answers.whole(outputs))

    def _compile(self, body: ChatRequest | CompletionRequest, name: str) -> list[Request]:
        """One engine request a prompt; ``name-i`` for all but a single one."""
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
                compiler.compile(prompt, params, request_id=own, **options)
                for prompt, own in zip(prompts, names, strict=True)
            ]
        except RequestError as error:
            raise body.blame(error) from error

    def _enter(self, http: HttpRequest, requests: Sequence[Request]) -> Ticket:
        client = http.scope.get("state", {}).get("client", NO_CLIENT)
        samples = sum(request.params.n for request in requests)
        tokens = sum(len(request.prompt) for request in requests)
        try:
            ticket = self._admission.enter(client, samples, tokens)
        except NotAdmitted as refused:
            self._metrics.refuse(refused.code)
            raise
        for request in requests:
            request.order = ticket.start
        return ticket

    async def _run(
        self, requests: Sequence[Request], ticket: Ticket, trace: Trace, seconds: float | None
    ) -> Run:
        """Events of all requests with their index. Raises TimedOut, EngineDeadError and
        RequestFailedError."""
        used = 0
        events: Run = merge([self._engine.generate_request(request) for request in requests])
        if seconds is not None:
            events = _in_time(events, seconds)
        try:
            async with contextlib.aclosing(events):
                async for i, event in events:
                    self._admission.began(ticket)
                    if isinstance(event, RequestOutput):
                        self._metrics.observe(event)
                        trace.observe(event)
                        used += event.usage.prompt_tokens + event.usage.completion_tokens
                    yield i, event
        except BaseException as error:  # leaving is one too
            if isinstance(error, RequestFailedError):
                self._metrics.refuse("request_failed")
            trace.fail(error)
            raise
        ticket.used = used

    async def _finish(self, run: Run, count: int) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(run) as events:
            async for i, event in events:
                if isinstance(event, RequestOutput):
                    outputs[i] = event
        return [outputs[i] for i in range(count)]

    async def _events(self, run: Run, answers: ResponseFormatter) -> AsyncGenerator[bytes, None]:
        """What a stream sends: events for each step of each sample, in the end usage."""
        finished: list[RequestOutput] = []
        for event in answers.begin():
            yield event
        try:
            async with contextlib.aclosing(run) as events:
                async for i, new in events:
                    if isinstance(new, RequestOutput):
                        finished.append(new)
                    else:
                        for event in answers.event(i, new):
                            yield event
            last = answers.end(finished)
        except EngineDeadError as error:
            last = answers.failed(str(error), "engine_dead")
        except RequestFailedError as error:
            last = answers.failed(str(error), "request_failed")
        except TimedOut as error:
            last = answers.failed(str(error), "request_timeout")
        for event in last:
            yield event


async def _in_time(events: Run, seconds: float) -> Run:
    """The same, or TimedOut."""
    deadline = asyncio.get_running_loop().time() + seconds
    async with contextlib.aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise TimedOut(f"the request took longer than {seconds:g} s") from error
            yield event


def unknown_model(asked: str, served: str) -> RequestError:
    """The error for a name that is not the served model's."""
    return RequestError(
        f"the model {asked!r} does not exist; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


def json_response(value: Any) -> Response:
    """A response of one JSON value."""
    body = msgspec.json.encode(value)
    return Response(body, media_type="application/json")
