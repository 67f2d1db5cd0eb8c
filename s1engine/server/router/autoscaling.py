"""How many replicas there should be: enough for the requests in flight and for the engines' queues.

An engine whose KV cache is full runs fewer requests than it may. What it runs is then what one
replica can hold, and waiting sequences need replicas of their own. Ray Serve asks a few times a
second, with means over some seconds (see ``deployment``). Does not know how replicas start.
"""

from typing import Any

# What replicas report: HTTP requests in flight, and sequences in their engines.
REQUESTS, RUNNING, WAITING = "requests", "running", "waiting"


def desired_replicas(
    replicas: int, requests: float, target: float, running: float, waiting: float
) -> float:
    """Return the number of replicas, not rounded.

    Args:
        replicas: running now.
        requests: in flight, waiting ones included.
        target: requests for each replica.
        running: sequences that all engines run.
        waiting: sequences that wait in all engines. Up to half of what one replica runs is no
            queue: every new sequence waits for the current step.
    """
    each = running / replicas if replicas else 0.0
    more = round(waiting / each) if each else 0
    return max(requests / target, replicas + more if more else 0)


def scale_by_queue(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy, on an ``AutoscalingContext``."""
    now = context.current_num_replicas
    if not now:
        return context.target_num_replicas, {}
    reports = context.aggregated_metrics or {}
    requests, running, waiting = (
        sum(reports.get(name, {}).values()) for name in (REQUESTS, RUNNING, WAITING)
    )
    target = context.config.target_ongoing_requests
    return desired_replicas(now, requests, target, running, waiting), {}
