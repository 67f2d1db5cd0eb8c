"""An OpenTelemetry span for each request, if traces are on.

Attributes have the names of the gen_ai conventions where these exist, vLLM's for the queue, and
``s1engine.thinking.*`` for thinking. A request with a W3C ``traceparent`` becomes its child.
Prompts and answers are not recorded. OpenTelemetry is imported only if a collector is configured.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit, urlunsplit

from s1engine import __version__
from s1engine.engine.request import Request
from s1engine.errors import RequestError
from s1engine.extras import require_extra
from s1engine.outputs import RequestOutput
from s1engine.server.api.response_formatter import ResponseHead, thinking_total

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACES_PATH = "/v1/traces"
FLUSH_S = 3.0  # for a collector to accept the last spans
NS = 1_000_000_000


class RequestTrace:
    """Records one request while it is answered, as a context manager; this base class records
    nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def observe(self, output: RequestOutput) -> None:
        """Record the output of one of its prompts."""

    def fail(self, error: BaseException) -> None:
        """Record why it cannot be answered."""

    def end(self) -> None:
        """End the record, once."""


class Tracing:
    """Starts traces that record nothing."""

    def begin(
        self,
        operation: str,
        headers: Mapping[str, str],
        head: ResponseHead,
        requests: Sequence[Request],
    ) -> RequestTrace:
        """Return the trace of an admitted request, which starts with its block; ``operation`` is
        gen_ai's name."""
        return RequestTrace()

    def shutdown(self) -> None:
        """Send what is pending, for at most FLUSH_S."""


class OtelTracing(Tracing):
    """Starts a span for each request.

    Args:
        provider: receives the spans.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("s1engine", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self,
        operation: str,
        headers: Mapping[str, str],
        head: ResponseHead,
        requests: Sequence[Request],
    ) -> RequestTrace:
        from opentelemetry.trace import SpanKind

        age = time.monotonic() - requests[0].arrival
        start_span = partial(
            self._tracer.start_span,
            f"{operation} {head.model}",
            self._propagator.extract(dict(headers)),
            SpanKind.SERVER,
            attributes=_request_attributes(operation, head, requests),
            start_time=time.time_ns() - int(age * NS),
        )
        return OtelRequestTrace(start_span)

    def shutdown(self) -> None:
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(FLUSH_S)  # a collector that hangs delays the exporter by half a minute


class OtelRequestTrace(RequestTrace):
    """A span of one request, from ``start_span``."""

    def __init__(self, start_span: "Callable[[], Span]") -> None:
        self._start_span = start_span
        self._outputs: list[RequestOutput] = []

    def __enter__(self) -> Self:
        self._span = self._start_span()
        return self

    def observe(self, output: RequestOutput) -> None:
        self._outputs.append(output)

    def fail(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, str(error) or None)
        self._span.set_attribute("error.type", type(error).__name__)

    def end(self) -> None:
        if self._outputs:
            self._span.set_attributes(_output_attributes(self._outputs))
        self._span.end()


def _request_attributes(
    operation: str, head: ResponseHead, requests: Sequence[Request]
) -> dict[str, Any]:
    params = requests[0].params
    attributes = {
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
    return {name: value for name, value in attributes.items() if value is not None}


def _output_attributes(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    samples = [sample for output in outputs for sample in output.outputs]
    usages = [output.usage for output in outputs]
    attributes: dict[str, Any] = {
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        "gen_ai.usage.reasoning.output_tokens": sum(usage.reasoning_tokens for usage in usages),
        "gen_ai.usage.cache_read.input_tokens": sum(usage.cached_tokens for usage in usages),
        "gen_ai.response.finish_reasons": [str(sample.finish_reason) for sample in samples],
        "gen_ai.response.time_to_first_chunk": min(output.timing.ttft_s for output in outputs),
        "gen_ai.latency.time_in_queue": max(output.timing.queue_s for output in outputs),
        "gen_ai.latency.e2e": max(output.timing.total_s for output in outputs),
    }
    thinking = [sample.thinking for sample in samples if sample.thinking is not None]
    if thinking:
        total = thinking_total(thinking)
        for name in ("tokens", "forced_tokens", "waits_used"):
            attributes[f"s1engine.thinking.{name}"] = total[name]
        attributes["s1engine.thinking.end_reasons"] = [used.end_reason or "" for used in thinking]
        attributes["s1engine.thinking.budgets"] = [used.budget for used in thinking]
    return attributes


def tracing_to(endpoint: str) -> Tracing:
    """Return tracing to a collector by OTLP over HTTP; a URL without a path gets TRACES_PATH.

    Raises RequestError.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise RequestError(
            f"otlp_traces_endpoint must be an http URL; got {endpoint!r}",
            param="otlp_traces_endpoint",
        )
    require_extra("otel", param="otlp_traces_endpoint")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if url.path in ("", "/"):
        url = url._replace(path=TRACES_PATH)
    resource = Resource.create({"service.name": "s1engine", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(urlunsplit(url))))
    return OtelTracing(provider)
