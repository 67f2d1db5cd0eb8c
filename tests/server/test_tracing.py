"""The span of each request: its attributes, its parent, and its end after an error."""

import asyncio
import socket
import sys
import time
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.errors import RequestError
from s1engine.server import tracing
from s1engine.server.app import create_app
from s1engine.server.tracing import OtelTracing, tracing_to
from tests.engine import faults

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}],
    "temperature": 0,
    "max_tokens": 90,
    "num_waits": 1,
    "thinking_token_budget": 40,
}
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def spans_of(*asks: tuple[str, dict[str, Any]], **headers: str) -> tuple[list[Any], list[Any]]:
    """The answers and the spans of some requests, one after another."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def main() -> list[httpx.Response]:
        engine = AsyncLLMEngine(EngineConfig(dtype="float32", max_num_seqs=16))
        await engine.start()
        transport = httpx.ASGITransport(create_app(engine, tracing=OtelTracing(provider)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            answers = [await http.post(path, json=body, headers=headers) for path, body in asks]
        await engine.shutdown()
        return answers

    answers = asyncio.run(main())
    return answers, list(exporter.get_finished_spans())


def test_a_span_says_what_the_answer_says() -> None:
    path = "/v1/chat/completions"
    refused = {**CHAT, "max_tokens": 0}
    prompts = {"prompt": ["a=1", "b=2"], "n": 2, "max_tokens": 5, "temperature": 1}
    answers, spans = spans_of(
        (path, CHAT),
        (path, {**CHAT, "stream": True}),
        (path, refused),
        ("/v1/completions", prompts),
        ("/v1/messages", {k: CHAT[k] for k in ("messages", "max_tokens")}),
        traceparent=PARENT,
    )
    assert len(spans) == 4, "one for each request that was let in"
    body, usage = answers[0].json(), answers[0].json()["usage"]
    first, streamed, raw, message = (dict(span.attributes) for span in spans)
    assert spans[0].name == "chat s1-nano" and spans[0].status.is_ok is not False
    assert first["gen_ai.response.id"] == body["id"]
    assert first["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert first["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    assert first["gen_ai.usage.reasoning.output_tokens"] == reasoning > 0
    assert first["s1engine.thinking.tokens"] == usage["thinking"]["tokens"]
    assert first["s1engine.thinking.waits_used"] == usage["thinking"]["waits_used"] == 1
    assert first["s1engine.thinking.end_reasons"] == (usage["thinking"]["end_reason"],)
    assert first["gen_ai.response.finish_reasons"] == ("stop",)
    assert first["gen_ai.request.max_tokens"] == 90 and first["gen_ai.request.temperature"] == 0
    queue, ttft = (
        first["gen_ai.latency.time_in_queue"],
        first["gen_ai.response.time_to_first_chunk"],
    )
    assert 0 <= queue <= ttft <= first["gen_ai.latency.e2e"]
    seconds = (spans[0].end_time - spans[0].start_time) / 1e9
    assert seconds >= first["gen_ai.latency.e2e"] - 0.01
    same = ("gen_ai.usage.output_tokens", "s1engine.thinking.tokens", "gen_ai.operation.name")
    assert all(first[name] == streamed[name] for name in same)
    assert streamed["gen_ai.request.stream"] and not first["gen_ai.request.stream"]
    assert raw["gen_ai.operation.name"] == "text_completion"
    assert len(raw["gen_ai.response.finish_reasons"]) == 4 and "s1engine.thinking.tokens" not in raw
    assert message["gen_ai.operation.name"] == "chat"
    for span in spans:
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert not any("messages" in name or "prompt" in name for name in first)


@pytest.mark.parametrize("parent", ["", "00-zz-00-01", "x" * 500])
def test_a_parent_that_is_none_is_ignored(parent: str) -> None:
    (span,) = _of_one({"prompt": "a", "max_tokens": 1}, traceparent=parent)
    assert span.parent is None


def _of_one(body: dict[str, Any], **headers: str) -> list[ReadableSpan]:
    return spans_of(("/v1/completions", body), **headers)[1]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"max_tokens": 1900, "ignore_eos": True, "timeout": 0.01}, "RequestTimeoutError"),
        ({"max_tokens": 5, "priority": faults.ADD}, "RequestFailedError"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], error: str, stream: bool
) -> None:
    faults.install(monkeypatch)
    (span,) = _of_one({"prompt": "a", "stream": stream, **body})
    assert not span.status.is_ok and span.attributes is not None
    assert span.attributes["error.type"] == error


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "opentelemetry.sdk", None)  # an import of it fails
        with pytest.raises(RequestError, match=r"pip install 's1engine\[otel\]'") as error:
            tracing_to("http://localhost:4318")
    assert "\n" not in str(error.value) and error.value.param == "otlp_traces_endpoint"
    for odd in ("localhost:4318", "ftp://x", ""):
        with pytest.raises(RequestError, match="http URL"):
            tracing_to(odd)
    tracing_to("http://127.0.0.1:1").shutdown()


def test_a_collector_that_hangs_delays_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as collector:  # accepts, and never answers
        traces = tracing_to(f"http://127.0.0.1:{collector.getsockname()[1]}")
        begin = time.monotonic()
        assert isinstance(traces, OtelTracing)
        for _ in range(5000):  # more than the exporter queues
            traces._tracer.start_span("x").end()
        traces.shutdown()
        assert time.monotonic() - begin < 9  # the exporter alone waits 10 s for an answer
