"""Throughput and latency in closed form: a batch in its steady state, no scheduler.

In a batch of B sequences every step emits B tokens, and each sequence needs one prefill per
``output`` tokens, so a token takes step(B) + prefill * B / output. The steady batch is the one that
finishes requests as fast as they arrive; if even the largest batch is too slow, requests queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from s1engine.plan import workload
from s1engine.plan.placement import Placement
from s1engine.plan.request_metrics import RequestMetrics, summarize_requests
from s1engine.plan.step_time import StepTimeModel, decode_step, prefill_steps
from s1engine.plan.workload import PlannedBudget, PlannedRequest

BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class SteadyState:
    """One replica serving requests of mean lengths."""

    placement: Placement
    time: StepTimeModel
    prompt: float
    output: float

    def prefill(self, prompt: float) -> float:
        """Seconds to the first token of a prompt that runs alone."""
        chunk = self.placement.max_num_batched_tokens
        return sum(map(self.time.seconds, prefill_steps(max(round(prompt), 1), chunk)))

    def decode(self, rows: float) -> float:
        """Seconds of a decode step of ``rows`` sequences, each at half of its output."""
        return self.time.seconds(decode_step(max(rows, 1), self.prompt + self.output / 2))

    def tpot(self, rows: float) -> float:
        """Seconds per token, prefills of other requests included."""
        return self.decode(rows) + self.prefill(self.prompt) * rows / self.output

    @property
    def largest_batch(self) -> int:
        return max(self.placement.largest_batch(self.prompt + self.output), 1)

    def requests_per_s(self, rows: float) -> float:
        """Requests that a batch of ``rows`` finishes per second."""
        return rows / (self.tpot(rows) * self.output)

    def batch(self, rate: float) -> float:
        """The batch that serves ``rate`` requests a second; the largest batch if none does."""
        low, high = 0.0, float(self.largest_batch)
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
    """The figures of ``summarize_requests``, with the steady batch and its capacity."""
    outputs = [workload.output_len(request, budget) for request in requests]
    prompts = [workload.prompt_len(request, budget) for request in requests]
    steady = SteadyState(placement, time, fmean(prompts), fmean(outputs))
    span, share = requests[-1].at - requests[0].at, len(requests) / replicas
    rate = (len(requests) - 1) / span / replicas if span > 0 else float("inf")
    one_batch = span == 0 and share <= steady.largest_batch  # all start together
    batch = min(steady.batch(rate), share)
    tpot = steady.decode(batch) if one_batch else steady.tpot(batch)
    capacity = steady.requests_per_s(batch) * replicas
    queues = not one_batch and capacity <= rate * replicas
    mean_prefill = steady.prefill(steady.prompt)
    served = []
    for number, request in enumerate(requests):
        if one_batch:
            wait = number // replicas * mean_prefill
        elif queues:  # until all requests before it, except one batch, have finished
            wait = max((number - batch * replicas) / capacity - (request.at - requests[0].at), 0.0)
        else:
            wait = min(batch, 1.0) * steady.decode(batch) / 2  # half of the current step
        first = request.at + wait + steady.prefill(prompts[number])
        end = first + tpot * (outputs[number] - 1)
        served.append(RequestMetrics(number, request, first, end, outputs[number]))
    largest = steady.requests_per_s(steady.largest_batch) * replicas
    return summarize_requests(served) | {
        "batch": batch,
        "capacity_tokens_per_s": largest * steady.output,
    }
