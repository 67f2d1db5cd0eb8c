"""Limits on the thinking of live requests: deadlines, calls of end_thinking, overload.

Owns the rule for overload. A limit is a lowered maximum of thinking tokens; the
scheduler's state machine ends the thinking.
"""

from collections.abc import Mapping

from s1engine import _core
from s1engine.engine.live_request import LiveRequest

THINKING_NOW = 0  # a maximum that ends thinking at the next token


class ThinkingLimits:
    """Lowers thinking maxima.

    Args:
        live_requests: by request id.
    """

    def __init__(
        self, scheduler: _core.Scheduler, live_requests: Mapping[str, LiveRequest]
    ) -> None:
        self._scheduler = scheduler
        self._live_requests = live_requests

    def end_thinking(self, request_id: str, reason: _core.EndReason) -> bool:
        """Makes a live request answer now. False if there is no such request."""
        live = self._live_requests.get(request_id)
        if live is not None:
            self._limit(live, THINKING_NOW, reason)
        return live is not None

    def shed_load(self, floor: int, max_num_seqs: int) -> None:
        """Lowers budgets towards ``floor``, all the way for a client of which ``max_num_seqs``
        sequences wait: no client's queue shortens the thinking of another."""
        if self._scheduler.stats().num_waiting == 0:
            return
        waiting = {
            client: self._scheduler.num_waiting(client)
            for client in {live.request.client for live in self._live_requests.values()}
        }
        for live in self._live_requests.values():
            budget = live.request.budget
            pressure = min(waiting[live.request.client] / max_num_seqs, 1.0)
            if budget is None or pressure == 0:
                continue
            excess = budget.max_thinking - max(floor, budget.min_thinking)
            maximum = budget.max_thinking - int(pressure * max(excess, 0))
            if maximum < (live.thinking_limit[0] if live.thinking_limit else budget.max_thinking):
                self._limit(live, maximum, _core.EndReason.OVERLOAD)

    def _limit(self, live: LiveRequest, maximum: int, reason: _core.EndReason) -> None:
        live.thinking_limit = (maximum, reason)
        self.apply(live)

    def apply(self, live: LiveRequest) -> None:
        """Applies the limit of a request to all its sequences, new ones included."""
        if live.thinking_limit is not None:
            for sequence in live.all_sequences():
                self._scheduler.limit_thinking(sequence.seq_id, *live.thinking_limit)
