"""Computes the masks of structured answers, so that no step waits long for one.

A mask usually takes microseconds, less than the way to another thread and back, but no grammar
promises that. So the masks of a request are computed inline while its latest ones were fast, and in
threads before that and after one that was not. Inline masks that turn out slow cost the steps at
most one part in INLINE_PAUSE of their time. A request whose masks have been slow several times gets
its later ones from threads of low priority; in both kinds of threads the requests take turns. Knows
matchers and threads, nothing of sequences.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from s1engine.engine.grammar import GrammarMatcher, lower_priority
from s1engine.engine.grammar_limits import MAX_SLOW_MASKS, SLOW_MASK_S

NUM_THREADS = 2  # of each kind
MASK_WAIT_S = 0.005  # of a step for the masks of its rows, once for each mask
MASKS_WAIT_S = 0.01  # of an engine that has nothing else to do
INLINE_MASK_S = 0.0002  # processor time of a fast mask: what the way through a thread costs
INLINE_AFTER = 3  # fast masks of a request in a row
INLINE_PAUSE = 100.0  # without inline masks, as a multiple of the time of one that was not fast


@dataclass(slots=True, eq=False)
class MaskCost:
    """What the masks of one request have cost so far."""

    num_slow: int = 0
    num_fast: int = 0  # in a row, the latest
    closed: bool = False  # the request has ended: its masks are not needed any more

    def record(self, seconds: float) -> None:
        """Records the processor time of a mask."""
        self.num_slow += seconds > SLOW_MASK_S
        self.num_fast = self.num_fast + 1 if seconds <= INLINE_MASK_S else 0


@dataclass(slots=True, eq=False)
class MaskJob:
    """The next mask of one answer: ``matcher`` consumes ``tokens``. ``done`` has a
    RequestFailedError if the grammar is too costly."""

    matcher: GrammarMatcher
    tokens: Sequence[int]
    cost: MaskCost
    done: "Future[None]" = field(default_factory=Future)
    overdue: bool = False  # a step has waited for it

    def run(self) -> None:
        """Computes the mask."""
        try:
            seconds = self.matcher.advance(self.tokens)
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.cost.record(seconds)
            self.done.set_result(None)


class _Turns:
    """Threads that compute masks, one of each request in turn."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._jobs: OrderedDict[MaskCost, deque[MaskJob]] = OrderedDict()

    def add(self, job: MaskJob) -> None:
        with self._lock:
            self._jobs.setdefault(job.cost, deque()).append(job)
        self._threads.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            cost, jobs = self._jobs.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._jobs[cost] = jobs
        if not cost.closed:
            job.run()


class MaskThreads:
    """Computes masks inline or in threads, those of slow requests apart from all others."""

    def __init__(self) -> None:
        self._fast = _Turns(ThreadPoolExecutor(NUM_THREADS, "s1engine-mask"))
        self._slow = _Turns(
            ThreadPoolExecutor(NUM_THREADS, "s1engine-slow-mask", initializer=lower_priority)
        )
        self._inline_from = 0.0  # time (monotonic, s) until which no mask is computed inline

    def advance(
        self, cost: MaskCost, matcher: GrammarMatcher, tokens: Sequence[int]
    ) -> MaskJob | None:
        """Lets ``matcher`` consume the next tokens of its answer. Its mask must be known. None: the
        next one is known as well; else a job computes it. Raises RequestFailedError if the grammar
        is too costly."""
        if cost.num_fast >= INLINE_AFTER and time.monotonic() >= self._inline_from:
            self._advance_inline(cost, matcher, tokens)
            return None
        matcher.mask = None
        slow = cost.num_slow >= MAX_SLOW_MASKS
        job = MaskJob(matcher, tokens, cost, overdue=slow)
        (self._slow if slow else self._fast).add(job)
        return job

    def _advance_inline(
        self, cost: MaskCost, matcher: GrammarMatcher, tokens: Sequence[int]
    ) -> None:
        seconds = matcher.advance(tokens)
        cost.record(seconds)
        if not cost.num_fast:
            self._inline_from = time.monotonic() + INLINE_PAUSE * seconds


def wait_for_masks(jobs: Sequence[MaskJob]) -> None:
    """Waits up to MASK_WAIT_S for those jobs that no step has waited for yet."""
    awaited = [job for job in jobs if not job.overdue and not job.done.done()]
    if awaited:
        futures.wait([job.done for job in awaited], MASK_WAIT_S)
    for job in awaited:
        job.overdue = True


def wait_for_a_mask(jobs: Sequence[MaskJob]) -> bool:
    """Waits up to MASKS_WAIT_S for one of ``jobs``. Returns whether one is done."""
    done = futures.wait([job.done for job in jobs], MASKS_WAIT_S, futures.FIRST_COMPLETED).done
    return bool(done)
