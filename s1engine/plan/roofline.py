"""Throughput and latency in closed form: a steady batch, no scheduler.

In a batch of B sequences each emits a token a step, and B of every ``output`` steps have a prompt
computed among them, so a token takes step(B) + prefill * B / output. The batch is the one at which
requests leave as fast as they come; where even the largest does not suffice, requests queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from s1engine.plan import workload
from s1engine.plan.placement import Placement
from s1engine.plan.request_metrics import RequestMetrics, summarize_requests
from s1engine.plan.step_time import StepTimeModel, decoding, prefill_steps
from s1engine.plan.workload import PlannedBudget, PlannedRequest

BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class SteadyState:
    """One replica under requests of mean lengths."""

    placement: Placement
    time: StepTimeModel
    prompt: float
    output: float

    def prefill(self, prompt: float) -> float:
        """Seconds to the first token of a prompt that is alone."""
        chunk = self.placement.max_num_batched_tokens
        return sum(map(self.time.seconds, prefill_steps(max(round(prompt), 1), chunk)))

    def decode(self, rows: float) -> float:
        """Seconds of a step of ``rows`` sequences in the middle of their output."""
        return self.time.seconds(decoding(max(rows, 1), self.prompt + self.output / 2))

    def tpot(self, rows: float) -> float:
        return self.decode(rows) + self.prefill(self.prompt) * rows / self.output

    @property
    def largest(self) -> int:
        return max(self.placement.largest_batch(self.prompt + self.output), 1)

    def requests_per_s(self, rows: float) -> float:
        """How fast a batch of that many finishes requests."""
        return rows / (self.tpot(rows) * self.output)

    def batch(self, rate: float) -> float:
        """The batch that keeps up with ``rate`` requests a second; the largest if none does."""
        low, high = 0.0, float(self.largest)
        if self.requests_per_s(high) <= rate:
            return high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.requests_per_s(middle) < rate else (low, middle)
        return high


def roofline(
    requests: Sequence[PlannedRequest],
    placement: Placement,
    time: StepTimeModel,
    *,
    budget: PlannedBudget,
    replicas: int = 1,
) -> dict[str, Any]:
    """The figures of ``served.figures``, with the batch that they stand for."""
    outputs = [workload.output_len(request, budget) for request in requests]
    prompts = [workload.prompt_len(request, budget) for request in requests]
    steady = SteadyState(placement, time, fmean(prompts), fmean(outputs))
    span, share = requests[-1].at - requests[0].at, len(requests) / replicas
    rate = (len(requests) - 1) / span / replicas if span > 0 else float("inf")
    once = span == 0 and share <= steady.largest  # one batch, and no more to come
    batch = min(steady.batch(rate), share)
    tpot = steady.decode(batch) if once else steady.tpot(batch)
    capacity = steady.requests_per_s(batch) * replicas
    queues = not once and capacity <= rate * replicas
    mean_prefill = steady.prefill(steady.prompt)
    served = []
    for number, request in enumerate(requests):
        if once:
            waits = number // replicas * mean_prefill
        elif queues:  # until all but a batch of those before it have left
            waits = max((number - batch * replicas) / capacity - (request.at - requests[0].at), 0.0)
        else:
            waits = min(batch, 1.0) * steady.decode(batch) / 2  # the step under way
        first = request.at + waits + steady.prefill(prompts[number])
        end = first + tpot * (outputs[number] - 1)
        served.append(RequestMetrics(number, request, first, end, outputs[number]))
    most = steady.requests_per_s(steady.largest) * replicas
    return summarize_requests(served) | {
        "batch": batch,
        "capacity_tokens_per_s": most * steady.output,
    }
