"""Requests against replicas in virtual time: each is routed as it arrives, none is lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from s1engine.plan.placement import Placement
from s1engine.plan.replica import Replica
from s1engine.plan.served import Served, figures
from s1engine.plan.step import StepTime
from s1engine.plan.workload import Ask, Budget

Route = Callable[[int, Sequence[Replica]], Replica]
ROUTINGS: dict[str, Route] = {
    "round-robin": lambda number, replicas: replicas[number % len(replicas)],
    "least-loaded": lambda number, replicas: min(replicas, key=lambda r: r.outstanding),
}


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulation came to; ``served`` in the order of arrival."""

    served: list[Served]
    replicas: list[Replica]

    def figures(self) -> dict[str, Any]:
        """Of all requests, and how busy the replicas were."""
        found = figures(self.served)
        busy = sum(replica.busy_s for replica in self.replicas)
        return found | {
            "busy": busy / (len(self.replicas) * found["duration_s"]),
            "preemptions": sum(replica.stats().num_preemptions for replica in self.replicas),
        }


def simulate(
    asks: Sequence[Ask],
    placement: Placement,
    time: StepTime,
    *,
    budget: Budget,
    replicas: int = 1,
    routing: str = "least-loaded",
) -> Simulation:
    """``asks`` by time of arrival, the first at 0 or later."""
    engines = [Replica(placement, time, budget) for _ in range(replicas)]
    route = ROUTINGS[routing]
    for number, ask in enumerate(asks):
        for engine in engines:
            engine.advance(ask.at)
        route(number, engines).submit(number, ask)
    for engine in engines:
        engine.advance(float("inf"))
    served = sorted((s for engine in engines for s in engine.finished), key=lambda s: s.number)
    return Simulation(served, engines)
