"""How many replicas there should be: enough for what is under way, and for what waits in engines.

An engine may run fewer requests than it is allowed to, because its KV cache is full: then what it
runs is what a replica can take, and what waits wants replicas of its own. Ray Serve asks a few
times a second, with means over some seconds (see ``fleet``). Knows nothing of how replicas start.
"""

from typing import Any

# What replicas report: requests under way, and the sequences in their engines.
REQUESTS, RUNNING, WAITING = "requests", "running", "waiting"


def wanted(replicas: int, requests: float, target: float, running: float, waiting: float) -> float:
    """Replicas, as a number that is not rounded.

    Args:
        replicas: that run now.
        requests: under way, waiting ones included.
        target: requests for each replica.
        running: sequences that all engines run.
        waiting: sequences that wait in all of them. Up to half of what one replica runs is no
            queue: whatever arrives waits for the step that goes on.
    """
    one = running / replicas if replicas else 0.0
    more = round(waiting / one) if one else 0
    return max(requests / target, replicas + more if more else 0)


def scale_by_queue(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy, of an ``AutoscalingContext``."""
    now = context.current_num_replicas
    if not now:
        return context.target_num_replicas, {}
    reports = context.aggregated_metrics or {}
    requests, running, waiting = (
        sum(reports.get(name, {}).values()) for name in (REQUESTS, RUNNING, WAITING)
    )
    return wanted(now, requests, context.config.target_ongoing_requests, running, waiting), {}
