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

from s1engine.engine.request import Request
from s1engine.engine.served import ServedEngine
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.server.admission import Admission, NotAdmitted, Ticket
from s1engine.server.answers import Answers, Head
from s1engine.server.metrics import Metrics
from s1engine.server.protocol import ChatRequest, CompletionRequest
from s1engine.server.streaming import EventStream, merge, unless_disconnected

MAX_GRAMMARS = 2  # that are checked at once
NO_CLIENT = ""  # where no API key tells clients apart


class TimedOut(Exception):
    """A request took longer than it may."""


class Generation:
    """Answers bodies, over one engine.

    Args:
        efforts: thinking tokens of each ``reasoning_effort``.
        timeout: seconds that a request may take if it does not say so itself; None: for ever.
    """

    def __init__(
        self,
        engine: ServedEngine,
        admission: Admission,
        metrics: Metrics,
        *,
        efforts: Mapping[str, int | None],
        timeout: float | None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        self._efforts = efforts
        self._timeout = timeout
        self._defaults = engine.compiler.text.default_sampling()
        # Grammars may take a second to check: those who ask for them wait for each other alone.
        self._slow = ThreadPoolExecutor(MAX_GRAMMARS, "s1engine-compile")

    async def answer(
        self,
        body: ChatRequest | CompletionRequest,
        http: HttpRequest,
        prefix: str,
        shape: Callable[[Head, int], Answers],
    ) -> Response:
        """Answers one HTTP request. Raises what becomes its status."""
        if not self._engine.healthy:
            raise EngineDeadError("the engine is not running")
        name = f"{prefix}{uuid.uuid4().hex}"
        pool = self._slow if body.has_grammar else None
        loop = asyncio.get_running_loop()
        requests = await loop.run_in_executor(pool, self._compile, body, name)
        samples = requests[0].params.n
        answers = shape(Head(name, int(time.time()), self._engine.config.model_name), samples)
        ticket = self._enter(http, requests)
        seconds = body.timeout if body.timeout is not None else self._timeout
        if body.stream:
            events = self._events(requests, ticket, answers, seconds)
            return EventStream(events, lambda: self._admission.leave(ticket))
        try:
            work = self._finish(requests, ticket, seconds)
            outputs = await unless_disconnected(http.receive, work)
        finally:
            self._admission.leave(ticket)
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
        self, requests: Sequence[Request], ticket: Ticket, seconds: float | None
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Events of all requests with their index. Raises TimedOut, EngineDeadError and
        RequestFailedError."""
        used = 0
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        async with contextlib.aclosing(merge([self._engine.run(r) for r in requests])) as events:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        i, event = await anext(events)
                except StopAsyncIteration:
                    break
                except TimeoutError as error:
                    raise TimedOut(f"the request took longer than {seconds:g} s") from error
                except RequestFailedError:
                    self._metrics.refuse("request_failed")
                    raise
                self._admission.began(ticket)
                if isinstance(event, RequestOutput):
                    self._metrics.observe(event)
                    used += event.usage.prompt_tokens + event.usage.completion_tokens
                yield i, event
        ticket.used = used

    async def _finish(
        self, requests: Sequence[Request], ticket: Ticket, seconds: float | None
    ) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self._run(requests, ticket, seconds)) as events:
            async for i, event in events:
                if isinstance(event, RequestOutput):
                    outputs[i] = event
        return [outputs[i] for i in range(len(requests))]

    async def _events(
        self, requests: Sequence[Request], ticket: Ticket, answers: Answers, seconds: float | None
    ) -> AsyncGenerator[bytes, None]:
        """What a stream sends: events for each step of each sample, in the end usage."""
        finished: list[RequestOutput] = []
        for event in answers.begin():
            yield event
        try:
            async with contextlib.aclosing(self._run(requests, ticket, seconds)) as events:
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
