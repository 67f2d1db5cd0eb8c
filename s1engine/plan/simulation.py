"""Requests routed to replicas in virtual time. Every request is served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from s1engine.plan.placement import Placement
from s1engine.plan.request_metrics import RequestMetrics, summarize_requests
from s1engine.plan.simulated_replica import SimulatedReplica
from s1engine.plan.step_time import StepTimeModel
from s1engine.plan.workload import PlannedBudget, PlannedRequest

Route = Callable[[int, Sequence[SimulatedReplica]], SimulatedReplica]
ROUTINGS: dict[str, Route] = {
    "round-robin": lambda number, replicas: replicas[number % len(replicas)],
    "least-loaded": lambda number, replicas: min(replicas, key=lambda r: r.outstanding),
}


@dataclass(frozen=True, slots=True)
class Simulation:
    """The outcome of a simulation; ``served`` is in the order of arrival."""

    served: list[RequestMetrics]
    replicas: list[SimulatedReplica]

    def summary(self) -> dict[str, Any]:
        """The summary of all requests, the busy share of the replicas, and preemptions."""
        summary = summarize_requests(self.served)
        busy = sum(replica.busy_s for replica in self.replicas)
        return summary | {
            "busy": busy / (len(self.replicas) * summary["duration_s"]),
            "preemptions": sum(replica.stats().num_preemptions for replica in self.replicas),
        }


def simulate(
    requests: Sequence[PlannedRequest],
    placement: Placement,
    time: StepTimeModel,
    *,
    budget: PlannedBudget,
    replicas: int = 1,
    routing: str = "least-loaded",
) -> Simulation:
    """Serves ``requests``, which are sorted by arrival time, the first at 0 or later."""
    engines = [SimulatedReplica(placement, time, budget) for _ in range(replicas)]
    route = ROUTINGS[routing]
    for number, request in enumerate(requests):
        for engine in engines:
            engine.advance(request.at)
        route(number, engines).submit(number, request)
    for engine in engines:
        engine.advance(float("inf"))
    served = sorted((s for engine in engines for s in engine.finished), key=lambda s: s.number)
    return Simulation(served, engines)
