"""The number of replicas as a function of requests in flight and of queues."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.router.autoscaling import (
    REQUESTS,
    RUNNING,
    WAITING,
    desired_replicas,
    scale_by_queue,
)

COUNTS = st.integers(1, 500)


@given(st.integers(1, 64), COUNTS, st.integers(0, 5000))
def test_without_a_queue_each_has_its_share(replicas: int, target: int, requests: int) -> None:
    assert desired_replicas(replicas, requests, target, requests, 0) == requests / target


@given(st.integers(1, 64), COUNTS, st.integers(1, 20))
def test_waiting_sequences_need_replicas_like_those_that_run(
    replicas: int, each: int, more: int
) -> None:
    """Independent of the target: full KV caches hold fewer sequences."""
    found = desired_replicas(replicas, 0, 10**9, replicas * each, more * each)
    assert found == replicas + more


@given(st.integers(1, 64), COUNTS, st.data())
def test_a_few_that_wait_for_a_step_need_no_replica(
    replicas: int, each: int, data: st.DataObject
) -> None:
    waiting = data.draw(st.floats(0, each / 2))
    assert desired_replicas(replicas, replicas * each, each, replicas * each, waiting) == replicas


def context(running: int, waiting: int, requests: int, **fields: Any) -> SimpleNamespace:
    metrics = {
        REQUESTS: {"a": requests - 1, "b": 1},
        RUNNING: {"a": running - 1, "b": 1},
        WAITING: {"a": waiting},
    }
    return SimpleNamespace(
        current_num_replicas=2,
        target_num_replicas=3,
        aggregated_metrics=metrics,
        config=SimpleNamespace(target_ongoing_requests=256),
        **fields,
    )


def test_ray_asks_with_the_sums_over_replicas() -> None:
    assert scale_by_queue(context(8, 8, 16)) == (4, {})
    assert scale_by_queue(context(8, 1, 9)) == (9 / 256, {})


def test_before_the_first_replica_runs_or_reports_nothing_is_guessed() -> None:
    starting = context(8, 8, 16)
    starting.current_num_replicas = 0
    assert scale_by_queue(starting) == (3, {})
    silent = context(8, 8, 16)
    silent.aggregated_metrics = None
    assert scale_by_queue(silent) == (0, {})


def test_ray_takes_the_policy_and_our_times() -> None:
    """As its controller sees them, without its warning about a field that it still reads."""
    pytest.importorskip("ray.serve", reason="replicas need Ray: pip install 's1engine[ray]'")
    from s1engine.server.router.deployment import (
        METRICS_S,
        UPSCALE_S,
        ReplicaPoolOptions,
        autoscaling_config,
    )

    found = autoscaling_config(ReplicaPoolOptions(max_replicas=5), 256)
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (1, 5, 256)
    assert (found.metrics_interval_s, found.upscale_delay_s) == (METRICS_S, UPSCALE_S)
    assert found.policy.get_policy()(context(8, 8, 16)) == (4, {})
