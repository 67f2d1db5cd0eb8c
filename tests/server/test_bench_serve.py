"""The load generator: requests, timings and the report."""

import asyncio
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.bench.load_generator import (
    LoadRequest,
    RequestTiming,
    at_rate,
    random_requests,
    send_requests,
    trace_requests,
)
from s1engine.bench.serve import report
from s1engine.errors import RequestError
from tests.server.conftest import KEY, Served


def test_it_measures_a_server(served: Served) -> None:
    requests = at_rate(random_requests(6, 12, 20, 0.5, 300, seed=1), rate=200.0, seed=2)
    extra = {"ignore_eos": True, "temperature": 0}
    timings = asyncio.run(
        send_requests(served.url, requests, api_key=KEY, max_concurrency=3, extra=extra)
    )
    assert [timing.error for timing in timings] == [None] * 6
    assert [timing.output_tokens for timing in timings] == [
        request.max_tokens for request in requests
    ]
    found = report(requests, timings, [50, 99], {"e2el": 1e9})
    assert found["completed"] == 6 and found["failed"] == 0
    assert found["total_output_tokens"] == sum(request.max_tokens for request in requests)
    assert found["total_input_tokens"] == sum(len(request.prompt) for request in requests)
    assert found["request_goodput"] == found["request_throughput"] > 0
    assert found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0
    (refused,) = asyncio.run(send_requests(served.url, requests[:1], api_key="wrong"))
    assert refused.error is not None and "API key" in refused.error
    with pytest.raises(RequestError, match="API key"):
        report(requests[:1], [refused], [99], {})


@pytest.mark.parametrize("usage", ["", '"usage":null,'])
@pytest.mark.parametrize("last", ["data: [DONE]\n\n", ""])
def test_it_understands_other_servers(usage: str, last: str) -> None:
    """Some send null before they know the usage; some never send [DONE]."""
    chunk = f'data: {{{usage}"choices":[{{"text":"x"}}]}}\n\n'
    total = 'data: {"usage":{"completion_tokens":2}}\n\n'

    async def one(body: str) -> RequestTiming:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"}}")
            assert b'"prompt": "cde"' in head
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body.encode())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            (timing,) = await send_requests(
                f"http://127.0.0.1:{port}", [LoadRequest(0.0, "cde", 2)]
            )
        return timing

    whole = asyncio.run(one(2 * chunk + total + last))
    assert (whole.error, len(whole.events), whole.output_tokens) == (None, 2, 2)
    assert asyncio.run(one(chunk)).error is not None


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.lists(st.floats(0.001, 2), min_size=2, max_size=9)),
        min_size=1,
        max_size=9,
    ),
    st.floats(1, 5000),
)
def test_the_report_is_what_its_names_say(
    runs: list[tuple[float, list[float]]], limit: float
) -> None:
    timings = []
    for begin, gaps in runs:
        times = [begin + sum(gaps[: i + 1]) for i in range(len(gaps))]
        timings.append(RequestTiming(begin, times[-1], times, len(times)))
    requests = random_requests(len(timings), 5, 5, 0.0, 300, 0)
    found = report(requests, timings, [99], {"ttft": limit})
    ttfts = [1e3 * gaps[0] for _, gaps in runs]
    assert found["mean_ttft_ms"] == pytest.approx(statistics.fmean(ttfts), abs=0.02)
    gaps = [1e3 * gap for _, own in runs for gap in own[1:]]
    assert found["median_itl_ms"] == pytest.approx(statistics.median(gaps), abs=0.02)
    tpots = [1e3 * statistics.fmean(own[1:]) for _, own in runs]
    assert found["mean_tpot_ms"] == pytest.approx(statistics.fmean(tpots), abs=0.02)
    assert found["p99_e2el_ms"] == pytest.approx(1e3 * max(sum(own) for _, own in runs), abs=0.02)
    assert found["tokens_per_event"] == 1


def test_traces_keep_their_times_and_lengths(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,396,109\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    rows = [(27482, 6955, 52), (30535, 6472, 26)]
    mooncake.write_text(
        "\n".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o}) for t, i, o in rows
        )
    )
    first = trace_requests(azure, 9, time_scale=2.0, length_scale=0.1, vocab_size=300, seed=0)
    assert [(request.at, len(request.prompt), request.max_tokens) for request in first] == [
        (0.0, 37, 4),
        (pytest.approx(2.0), 39, 10),
    ]
    second = trace_requests(mooncake, 1, time_scale=1.0, length_scale=1.0, vocab_size=300, seed=0)
    assert [(request.at, len(request.prompt), request.max_tokens) for request in second] == [
        (0.0, 6955, 52)
    ]
    assert all(3 <= token < 300 for request in first + second for token in request.prompt)


def test_a_rate_is_kept_on_average() -> None:
    requests = at_rate(random_requests(4000, 1, 1, 0.0, 300, 0), rate=50.0, seed=1)
    assert requests[-1].at == pytest.approx(80, rel=0.1)
    assert all(request.at == 0 for request in at_rate(requests, float("inf"), 0))
