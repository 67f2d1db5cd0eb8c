"""Deadlines of live requests: when thinking must end, a first token is due, and all must end.

Owns the times, in order. A request that is removed leaves no entry. Thinking ends by a lowered
maximum (ThinkingLimits); the engine ends the requests that ``enforce`` returns. Deadlines are
checked between steps, so they are kept to the length of a step.
"""

import bisect
import math
from collections.abc import Iterator, Mapping
from enum import IntEnum

from s1engine import _core
from s1engine.engine.live_request import LiveRequest
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import answer_reserve
from s1engine.engine.thinking_limits import ThinkingLimits
from s1engine.sampling_params import ThinkingBudget


class Kind(IntEnum):
    """What a deadline ends."""

    THINKING = 0
    FIRST_TOKEN = 1  # the whole request, if it has no token yet
    REQUEST = 2
    ANSWER = 3  # the thinking, if the rest of the time is what the answer needs


Entry = tuple[float, str, Kind]  # time (monotonic, s), request id


class Deadlines:
    """Deadlines of ``live_requests``, which are by request id.

    Args:
        max_step: seconds of a step that a deadline waits for; 0: unlimited.
    """

    def __init__(
        self,
        scheduler: _core.Scheduler,
        live_requests: Mapping[str, LiveRequest],
        limits: ThinkingLimits,
        max_step: float,
    ) -> None:
        self._scheduler = scheduler
        self._live_requests = live_requests
        self._limits = limits
        self._entries: list[Entry] = []  # sorted
        self._by_request: dict[str, list[Entry]] = {}
        self._max_step = max_step
        self._last_step = 0.0  # s, at most max_step

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        """Adds the deadlines of a request that is live from now on."""
        if (at := request.thinking_deadline) is not None:
            self._insert((at, request.request_id, Kind.THINKING))
        if (at := request.first_token_deadline) is not None:
            self._insert((at, request.request_id, Kind.FIRST_TOKEN))
        if (at := request.deadline) is not None:
            self._insert((at, request.request_id, Kind.REQUEST))
            if request.budget is not None:
                self._insert((request.arrival, request.request_id, Kind.ANSWER))

    def remove(self, request_id: str) -> None:
        """Removes all deadlines of a request."""
        for entry in self._by_request.pop(request_id, ()):
            del self._entries[bisect.bisect_left(self._entries, entry)]

    def rebuild(self) -> None:
        """Derives all entries from the live requests, after a call that was interrupted."""
        self._entries.clear()
        self._by_request.clear()
        for live in list(self._live_requests.values()):
            self.add(live.request)

    def _insert(self, entry: Entry) -> None:
        bisect.insort(self._entries, entry)
        self._by_request.setdefault(entry[1], []).append(entry)

    def _delete(self, entry: Entry) -> None:
        del self._entries[bisect.bisect_left(self._entries, entry)]
        self._by_request[entry[1]].remove(entry)

    def time_left(self, now: float) -> float:
        """Seconds until the next deadline; infinite if there is none."""
        for at, _, kind in self._entries:
            if kind != Kind.ANSWER:  # only the time of the next check
                return at - now
        return math.inf

    def record_step(self, seconds: float) -> None:
        """Records the duration of the last step, or of several steps of a multi-step decode."""
        if self._entries:
            self._last_step = min(seconds, self._max_step)

    def enforce(self, now: float) -> list[LiveRequest]:
        """Ends the thinking of requests whose time for it is over before the next step would end.
        Returns those that must end as a whole."""
        expired: list[LiveRequest] = []
        for entry in self._due(now):
            at, request_id, kind = entry
            live = self._live_requests[request_id]
            if kind == Kind.ANSWER:
                self._reserve_answer(live, now)
            elif kind == Kind.THINKING:
                self._limits.end_thinking(request_id, _core.EndReason.DEADLINE)
            elif at > now:
                continue
            elif kind == Kind.REQUEST or not any(s.has_output for s in live.all_sequences()):
                if live not in expired:
                    expired.append(live)
                continue  # removed with its request
            self._delete(entry)
        return expired

    def _due(self, now: float) -> Iterator[Entry]:
        """Entries whose time comes before the next step would end, if it takes as long as the last
        one."""
        end = bisect.bisect_right(self._entries, now + self._last_step, key=_time)
        yield from self._entries[:end]

    def _reserve_answer(self, live: LiveRequest, now: float) -> None:
        """Ends the thinking when the time left is what the answer needs; else checks again after
        half of the time until then, because steps may become slower."""
        request = live.request
        assert request.deadline is not None and request.budget is not None
        budget = request.params.thinking or ThinkingBudget()
        tokens = answer_reserve(budget, request.max_len - len(request.prompt))
        tokens += len(request.budget.forced_end)
        thinking_left = request.deadline - tokens * self._scheduler.decode_time - now
        if thinking_left <= self._last_step:
            self._limits.end_thinking(request.request_id, _core.EndReason.DEADLINE)
        else:
            again = now + self._last_step + thinking_left / 2
            self._insert((again, request.request_id, Kind.ANSWER))


def _time(entry: Entry) -> float:
    return entry[0]
