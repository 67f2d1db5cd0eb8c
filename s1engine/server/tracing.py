"""A span of OpenTelemetry for each request, for whoever asks for traces.

Attributes carry the names of the gen_ai conventions where there are such, vLLM's for the queue, and
``s1engine.thinking.*`` for what no one else has. A request that brings a W3C ``traceparent`` is a
child of it. Nothing of prompts or answers is recorded. Without a collector nothing here is loaded.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from s1engine import __version__
from s1engine.engine.request import Request
from s1engine.errors import RequestError
from s1engine.outputs import RequestOutput
from s1engine.server.api.response_formatter import Head, thinking_total

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACES_PATH = "/v1/traces"
NS = 1_000_000_000


class Trace:
    """What is to be told of one request while it is answered; this one tells nobody."""

    def observe(self, output: RequestOutput) -> None:
        """One of its prompts is answered."""

    def fail(self, error: BaseException) -> None:
        """It cannot be answered."""

    def end(self) -> None:
        """It is over; once, after everything else."""


class Tracing:
    """Makes no traces."""

    def begin(
        self, operation: str, headers: Mapping[str, str], head: Head, requests: Sequence[Request]
    ) -> Trace:
        """A request was let in. ``operation`` as gen_ai names it."""
        return Trace()

    def shutdown(self) -> None:
        """Sends what was not sent yet. May take seconds."""


class OtelTracing(Tracing):
    """Makes spans.

    Args:
        provider: where they go.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("s1engine", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, operation: str, headers: Mapping[str, str], head: Head, requests: Sequence[Request]
    ) -> Trace:
        from opentelemetry.trace import SpanKind

        age = time.monotonic() - requests[0].arrival
        span = self._tracer.start_span(
            f"{operation} {head.model}",
            self._propagator.extract(dict(headers)),
            SpanKind.SERVER,
            attributes=_asked(operation, head, requests),
            start_time=time.time_ns() - int(age * NS),
        )
        return OtelTrace(span)

    def shutdown(self) -> None:
        self._provider.shutdown()


class OtelTrace(Trace):
    """A span that grows."""

    def __init__(self, span: "Span") -> None:
        self._span = span
        self._outputs: list[RequestOutput] = []

    def observe(self, output: RequestOutput) -> None:
        self._outputs.append(output)

    def fail(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, str(error) or None)
        self._span.set_attribute("error.type", type(error).__name__)

    def end(self) -> None:
        if self._outputs:
            self._span.set_attributes(_answered(self._outputs))
        self._span.end()


def _asked(operation: str, head: Head, requests: Sequence[Request]) -> dict[str, Any]:
    params = requests[0].params
    asked = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "s1engine",
        "gen_ai.request.model": head.model,
        "gen_ai.response.model": head.model,
        "gen_ai.response.id": head.id,
        "gen_ai.request.stream": requests[0].stream,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stop_sequences": params.stop or None,
        "gen_ai.usage.input_tokens": sum(len(request.prompt) for request in requests),
    }
    return {name: value for name, value in asked.items() if value is not None}


def _answered(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    samples = [sample for output in outputs for sample in output.outputs]
    usages = [output.usage for output in outputs]
    answered: dict[str, Any] = {
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        "gen_ai.usage.reasoning.output_tokens": sum(usage.reasoning_tokens for usage in usages),
        "gen_ai.usage.cache_read.input_tokens": sum(usage.cached_tokens for usage in usages),
        "gen_ai.response.finish_reasons": [str(sample.finish_reason) for sample in samples],
        "gen_ai.response.time_to_first_chunk": min(output.timing.ttft_s for output in outputs),
        "gen_ai.latency.time_in_queue": max(output.timing.queue_s for output in outputs),
        "gen_ai.latency.e2e": max(output.timing.total_s for output in outputs),
    }
    thought = [sample.thinking for sample in samples if sample.thinking is not None]
    if thought:
        total = thinking_total(thought)
        for name in ("tokens", "forced_tokens", "waits_used"):
            answered[f"s1engine.thinking.{name}"] = total[name]
        answered["s1engine.thinking.end_reasons"] = [used.end_reason or "" for used in thought]
        answered["s1engine.thinking.budgets"] = [used.budget for used in thought]
    return answered


def tracing_to(endpoint: str) -> Tracing:
    """Spans to a collector that speaks OTLP over HTTP; a URL without a path gets the usual one.
    Raises RequestError."""
    place = urlsplit(endpoint)
    if place.scheme not in ("http", "https") or not place.netloc:
        raise RequestError(
            f"otlp_traces_endpoint must be an http URL; got {endpoint!r}",
            param="otlp_traces_endpoint",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RequestError(
            "otlp_traces_endpoint needs OpenTelemetry: pip install 's1engine[otel]'",
            param="otlp_traces_endpoint",
        ) from error
    if place.path in ("", "/"):
        place = place._replace(path=TRACES_PATH)
    resource = Resource.create({"service.name": "s1engine", "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(urlunsplit(place))))
    return OtelTracing(provider)
