"""When an engine's process counts as dead, and whether another one follows it.

Counts seconds in ticks of this process, not by a clock: a laptop that sleeps, or a debugger that
stops both processes, is no silence of the engine.
"""

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s1engine.checks import check_fields, float_in, int_in

if TYPE_CHECKING:
    from s1engine.engine.request import Request

RESTART_WINDOW_S = 3600.0  # in which ``engine_restarts`` are counted
FIRST_PAUSE_S = 1.0  # before a restart; each further one of the window waits twice as long
MAX_PAUSE_S = 60.0
MAX_SUSPECTS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """How a client watches its engine's process. Raises RequestError."""

    engine_silence_timeout: float = 30.0
    """seconds without a heartbeat, sent by a thread of its own, after which the engine's process
    counts as frozen and is killed"""
    engine_step_timeout: float = 600.0
    """seconds in which an engine that has work completes no step, after which it counts as hung and
    is killed; above the longest step, kernels that compile included"""
    engine_restarts: int = 3
    """restarts of a dead engine within an hour, while /health is 503; then the server ends"""

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "engine_silence_timeout": float_in(3.0, 2.0**31),  # some heartbeats
                "engine_step_timeout": float_in(1.0, 2.0**31),
                "engine_restarts": int_in(0, 1000),
            },
        )


class EngineWatchdog:
    """Decides when a running engine counts as dead. ``tick`` is called once a second."""

    def __init__(self, limits: Supervision) -> None:
        self._limits = limits
        self._silence = 0  # ticks since the last sign of life
        self._stalled = 0.0  # seconds, by the engine's own count

    def record_sign(self) -> None:
        """The engine has sent anything."""
        self._silence = 0

    def record_stalled(self, seconds: float) -> None:
        """The engine has had work for so long and completed no step."""
        self._stalled = seconds

    def tick(self) -> str | None:
        """A second has passed. Returns why the engine counts as dead; None: it does not."""
        self._silence += 1
        if self._silence > self._limits.engine_silence_timeout:
            return f"the engine is frozen: no heartbeat for {self._silence - 1} s"
        if self._stalled > self._limits.engine_step_timeout:
            return f"the engine hangs: no step was completed for {self._stalled:g} s"
        return None


class RestartBudget:
    """Counts restarts within the last RESTART_WINDOW_S."""

    def __init__(self, restarts: int) -> None:
        self._restarts = restarts
        self._times: deque[float] = deque()

    def next_pause(self) -> float | None:
        """Uses a restart up. Returns the seconds to wait before it; None: none is left."""
        now = time.monotonic()
        while self._times and self._times[0] < now - RESTART_WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self._restarts:
            return None
        self._times.append(now)
        return float(min(FIRST_PAUSE_S * 2 ** (len(self._times) - 1), MAX_PAUSE_S))


class Suspects:
    """The requests that were live when an engine died, the latest MAX_SUSPECTS. One that was live
    at two deaths is not run again, of any client."""

    def __init__(self) -> None:
        self._deaths: OrderedDict[bytes, int] = OrderedDict()  # by digest of a request

    def accuse(self, requests: Iterable["Request"]) -> None:
        """The engine died while these were live."""
        for digest in {_digest(request) for request in requests}:
            self._deaths[digest] = self._deaths.pop(digest, 0) + 1
            if len(self._deaths) > MAX_SUSPECTS:
                self._deaths.popitem(last=False)

    def must_not_run(self, request: "Request") -> bool:
        """Was this request live at two deaths?"""
        return bool(self._deaths) and self._deaths.get(_digest(request), 0) > 1


def _digest(request: "Request") -> bytes:
    """Equal for requests that an engine computes alike."""
    text = repr((request.params, request.budget, request.max_len)).encode()
    return hashlib.sha256(request.prompt.tobytes() + text).digest()
