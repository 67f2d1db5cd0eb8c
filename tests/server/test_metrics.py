"""Metrics: counters match the requests, and Prometheus can parse the text."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from s1engine import server
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.server.metrics import Metrics
from tests.server.conftest import Served

ALERTS = Path(__file__).resolve().parents[2] / "examples" / "deploy" / "alerts.yml"


def values(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and the labels that differ within a family."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = [v for k, v in sample.labels.items() if k not in ("model_name", "le")]
            if "le" not in sample.labels:
                found[sample.name, *extra] = sample.value
    return found


def test_counters_follow_the_requests(llm: LLM) -> None:
    metrics = Metrics("s1-nano", llm.engine.stats)
    chats = [[{"role": "user", "content": f"a={i} b=a+1 b?"}] for i in range(5)]
    budget = ThinkingBudget(max_tokens=20, num_waits=2, checkpoints=(4,))
    params = SamplingParams(temperature=0, max_tokens=100, thinking=budget)
    outputs = llm.chat(chats, params, progress=False)
    for output in outputs:
        metrics.observe(output)
    got = values(metrics.render().decode())
    samples = [output.outputs[0] for output in outputs]
    used: list[Any] = [sample.thinking for sample in samples]
    assert got[("s1engine:generation_tokens_total",)] == sum(len(s.token_ids) for s in samples)
    assert got[("s1engine:request_thinking_tokens_sum",)] == sum(u.tokens for u in used)
    assert got[("s1engine:request_thinking_tokens_count",)] == 5
    assert got[("s1engine:thinking_waits_total",)] == sum(u.waits_used for u in used) > 0
    assert got[("s1engine:forced_tokens_total",)] == sum(u.forced_tokens for u in used)
    assert got[("s1engine:checkpoint_answers_total",)] == 5
    ends = {key[1]: n for key, n in got.items() if key[0] == "s1engine:thinking_end_total"}
    assert ends == {reason: [u.end_reason for u in used].count(reason) for reason in ends}
    assert sum(ends.values()) == 5
    assert got[("s1engine:thinking_budget_utilization_sum",)] == pytest.approx(
        sum(u.tokens / 20 for u in used)
    )
    assert got[("s1engine:num_requests_running",)] == 0
    assert got[("s1engine:kv_cache_usage_perc",)] == 0
    assert got[("s1engine:prefix_cache_hits_total",)] > 0


def test_the_server_shows_them(served: Served) -> None:
    def finished() -> float:
        answer = served.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return sum(n for key, n in values(answer.text).items() if "request_success_total" in key[0])

    before = finished()
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "a=1 a?"}], "n": 2, "stream": stream}
        assert served.http.post("/v1/chat/completions", json=body).status_code == 200
    assert finished() == before + 4


def test_dashboard_and_alerts_ask_only_for_what_there_is(llm: LLM) -> None:
    board = json.loads((Path(server.__file__).parent / "grafana.json").read_text())
    metrics = Metrics("s1-nano", llm.engine.stats)
    metrics.count_refused("queue_full")
    metrics.observe(llm.chat([{"role": "user", "content": "a=1 a?"}], progress=False)[0])
    families = text_string_to_metric_families(metrics.render().decode())
    known = {sample.name for family in families for sample in family.samples}
    asked = re.findall(r"s1engine:\w+", json.dumps(board))
    assert len(asked) > 20 and set(asked) <= known
    alerts = re.findall(r"s1engine:\w+", ALERTS.read_text())
    assert len(alerts) > 5 and set(alerts) <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
