"""Live requests in the engine: their sequences, those that wait for a grammar, those that failed.

Knows which sequences belong together and when all of them are finished. Knows neither scheduler nor
model nor text.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field

from s1engine import _core
from s1engine.engine.grammar import GrammarCompiler, GrammarMatcher
from s1engine.engine.mask_threads import MaskCost, MaskJob
from s1engine.engine.request import Request
from s1engine.errors import RequestFailedError

MAX_SUBMITTED = 2  # grammars: one that is compiled, and one that follows at once
GRAMMAR_WAIT_S = 0.01  # of an engine that has nothing else to do

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sample of a request in the scheduler, or the branch of a sample at a checkpoint."""

    live_request: "LiveRequest"
    seq_id: int
    seed: int
    has_output: bool = False
    finished: bool = False
    answering: bool = False  # past its thinking
    matcher: GrammarMatcher | None = None
    mask_job: MaskJob | None = None  # computes the matcher's next mask
    num_processed: int = 0  # tokens that the matcher has seen, or passed over


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request between ``add_request`` and its end."""

    request: Request
    seed: int
    matcher: "futures.Future[GrammarMatcher] | None" = None  # copied for each sequence
    mask_cost: MaskCost = field(default_factory=MaskCost)
    thinking_limit: tuple[int, _core.EndReason] | None = None  # lowered maximum, reason
    samples: list[LiveSequence] = field(default_factory=list)
    branches: list[LiveSequence] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True once every sample is in the scheduler."""
        return len(self.samples) == self.request.params.n

    @property
    def finished(self) -> bool:
        """True once all samples and branches are finished."""
        return self.complete and all(sequence.finished for sequence in self.all_sequences())

    def all_sequences(self) -> Iterator[LiveSequence]:
        """Samples, then their branches."""
        yield from self.samples
        yield from self.branches


def sample_seed(seed: int, index: int) -> int:
    """Key of the noise of sample ``index``: the seed itself for the first, a hash for others.

    Returned as a signed 64-bit integer, the form in which tensors hold it."""
    if index == 0:
        key = seed % 2**64
    else:
        key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
    return key - 2**64 if key >= 2**63 else key


class PendingGrammars:
    """Requests whose grammar is being compiled, while the engine steps on with the others.

    Grammars of clients are compiled by turns, so that a client with many delays no other.
    """

    def __init__(self, grammars: GrammarCompiler) -> None:
        self._grammars = grammars
        self._pending: list[LiveRequest] = []  # those without a matcher have not begun
        self._compiling: list[futures.Future[GrammarMatcher]] = []  # of requests that left, too
        self._turns: dict[int, int] = {}  # grammars begun when each client had its last turn
        self._num_begun = 0

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, live: LiveRequest) -> None:
        """Adds a request, whose grammar is to be compiled in another thread."""
        self._pending.append(live)
        self._begin()

    def _begin(self) -> None:
        """Submits the next grammars, as long as the thread has fewer than MAX_SUBMITTED."""
        waiting = [live for live in self._pending if live.matcher is None]
        self._compiling = [matcher for matcher in self._compiling if not matcher.done()]
        while waiting and len(self._compiling) < MAX_SUBMITTED:
            live = min(waiting, key=lambda live: self._turns.get(live.request.client, 0))
            waiting.remove(live)
            self._num_begun += 1
            self._turns[live.request.client] = self._num_begun
            grammar = live.request.params.grammar
            assert grammar is not None
            live.matcher = self._grammars.submit(grammar)
            if not live.matcher.done():
                self._compiling.append(live.matcher)

    def restore(self, live: LiveRequest) -> None:
        """Adds a request again that ``pop_ready`` has returned."""
        if live not in self._pending:
            self._pending.append(live)

    def remove(self, live: LiveRequest) -> bool:
        """Removes a request. False if it is not pending."""
        if live not in self._pending:
            return False
        self._pending.remove(live)
        return True

    def pop_ready(self, wait: bool) -> list[LiveRequest]:
        """Removes and returns the requests whose grammar is compiled; ``wait``: waits up to
        GRAMMAR_WAIT_S for the first one."""
        self._begin()
        if wait and self._pending:
            matchers = [live.matcher for live in self._pending if live.matcher is not None]
            futures.wait(matchers, GRAMMAR_WAIT_S, futures.FIRST_COMPLETED)
        ready = [live for live in self._pending if live.matcher and live.matcher.done()]
        self._pending = [live for live in self._pending if live not in ready]
        return ready


class FailedRequests:
    """Requests that failed alone: an exception raised on behalf of one request ends only that one.

    A RequestFailedError tells the user why, such as a grammar that became too costly. Any other
    exception is a bug, because user errors are rejected earlier. An exception that concerns all
    requests, such as a failing step, is not caught here and ends the engine.
    """

    def __init__(self) -> None:
        self.failing: list[LiveRequest] = []  # to be removed between steps
        self.errors: list[tuple[Request, RequestFailedError]] = []  # not reported to users yet

    def __bool__(self) -> bool:
        return bool(self.errors)

    @contextlib.contextmanager
    def isolate(self, live: LiveRequest) -> Iterator[None]:
        """An exception raised within the block fails this request only."""
        try:
            yield
        except Exception as error:
            self.add(live, error)

    def add(self, live: LiveRequest, error: Exception) -> None:
        """Marks a request as failed. Only its first error is reported."""
        if live in self.failing:
            return
        if not any(request is live.request for request, _ in self.errors):
            self.report(live.request, error)
        self.failing.append(live)

    def report(self, request: Request, error: Exception) -> None:
        """Logs an error and keeps it for ``pop_errors``."""
        if isinstance(error, RequestFailedError):
            logger.warning("request %s failed: %s", request.request_id, error)
            self.errors.append((request, error))
            return
        logger.error("request %s failed: %r", request.request_id, error, exc_info=error)
        failure = RequestFailedError("the engine could not go on with this request")
        failure.__cause__ = error
        self.errors.append((request, failure))

    def pop_errors(self) -> list[tuple[Request, RequestFailedError]]:
        """Removes and returns the errors that are not reported to users yet."""
        errors, self.errors = self.errors, []
        return errors
