"""``bench embed``: the command at the bundled model, its host program, and its arithmetic."""

import argparse
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.bench import command, embed, embed_host

SMALL = ("--starts", "1", "--rounds", "1", "--prompt-words", "20", "--new-tokens", "6")


class Scripted:
    """An EmbeddedModel of as many tokens as asked for."""

    concurrent = True

    def __init__(self, context: int = 100) -> None:
        self.context = context
        self.threads: set[int] = set()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def stream(self, ids: list[int], new: int, rule: str | None = None) -> Iterator[str]:
        if len(ids) > self.context:
            raise ValueError("too long")
        self.threads.add(threading.get_ident())
        for _ in range(new):
            yield "a"

    def complete_by(self, ids: list[int], new: int, deadline_s: float) -> int:
        threading.Event().wait(deadline_s)
        return new


def server(model: Any) -> embed_host.JobServer:
    adapter = SimpleNamespace(PACKAGE="pytest", load=lambda *_: model)
    jobs = embed_host.JobServer(adapter)
    jobs.load("model", 1, {})
    return jobs


def test_all_figures_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    model = str(embed.BUNDLED_MODEL)
    words = ["embed", "--model", model, "--threads", "1", "--deadlines", "2", *SMALL]
    status = command.run(parser.parse_args(words))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and found["failures"] == []
    [row] = found["rows"]
    for name in ("ttft_cold", "ttft_warm", "itl", "itl_busy", "itl_loop", "loop_lag"):
        assert row[f"{name}_p99_ms"] >= row[f"{name}_p50_ms"] >= 0
    for name in ("late_alone", "late_beside_8", "late_at_arrival"):
        assert row[f"{name}_p99_ms"] >= row[f"{name}_p50_ms"]
    for rule in embed.RULES:
        assert row[f"{rule}_ratio"] > 0
    assert row["peak_mib"] >= row["resident_mib"] > 0


@pytest.mark.parametrize("beside", [None, "busy", "loop"])
def test_a_stream_has_a_time_for_each_token(beside: str | None) -> None:
    model = Scripted()
    found = server(model).stream("abc", 5, None, beside)
    assert found["tokens"] == 3
    assert len(found["times"]) == 5 and found["times"] == sorted(found["times"])
    assert ("lags" in found) == (beside == "loop")


def test_deadlines_count_from_the_request() -> None:
    model = Scripted()
    found = server(model).deadlines("abcdefghij", 5, [0.01, 0.02], 3, 50)
    assert len(found["errors"]) == 2 and min(found["errors"]) >= 0
    assert len(model.threads) >= 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_long_prompt_that_is_refused_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="0 of 1 long prompts"):
        server(Scripted(context=20)).deadlines("abcdefghij", 5, [0.01], 0, 50)


def test_an_engine_for_one_thread_has_no_streams_beside() -> None:
    model = Scripted()
    model.concurrent = False
    with pytest.raises(NotImplementedError, match="one thread"):
        server(model).deadlines("abc", 5, [0.01], 8, 0)


@given(st.lists(st.floats(0, 10), min_size=1), st.sampled_from([0.5, 0.99, 1.0]))
def test_a_percentile_is_the_least_value_that_covers_its_share(
    values: list[float], share: float
) -> None:
    found = embed.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    below = [value for value in values if value < found]
    assert not below or len([v for v in values if v <= max(below)]) < share * len(values)
