"""Admission control: bounds concurrency, fair per API key, rejects while draining.

Fairness is start-time fair queueing: each client has a clock that advances by the tokens it asks
for, and the scheduler runs the earliest start first. Requests of a single client run in order of
arrival. A client with a thousand requests does not delay another client's first one.
"""

import asyncio
from dataclasses import dataclass

MAX_QUEUED = 1024  # samples that wait while as many as can run do
RETRY_AFTER_S = 1  # seconds, while the queue is full
DRAINING_RETRY_AFTER_S = 10  # until another instance runs
USUAL_ANSWER = 256  # tokens charged for each sample until the real number is known


class NotAdmitted(Exception):
    """The request is rejected for now.

    Attributes:
        status: 429 if the queue is full, 503 if the server drains.
        retry_after: seconds.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(slots=True)
class Ticket:
    """An admitted request, to be released."""

    client: str
    samples: int
    start: int  # the scheduler's order
    charged: int  # tokens
    used: int | None = None  # tokens, once all are generated
    released: bool = False


class Admission:
    """Admits and releases requests. All calls come from one event loop.

    Args:
        max_samples: samples admitted at once, running or waiting.
    """

    def __init__(self, max_samples: int) -> None:
        self.draining = False
        self._max_samples = max_samples
        self._num_samples = 0
        self._now = 0  # start of the latest request that began to run
        self._clocks: dict[str, int] = {}
        self._num_tickets: dict[str, int] = {}  # of each client that has any
        self._idle = asyncio.Event()

    @property
    def num_samples(self) -> int:
        """Samples that run or wait."""
        return self._num_samples

    def admit(self, client: str, samples: int, prompt_tokens: int) -> Ticket:
        """Admit a request. Raises NotAdmitted.

        A request for more than ``max_samples`` is admitted if it is alone.
        """
        if self.draining:
            raise NotAdmitted(
                "the server is shutting down",
                status=503,
                code="shutting_down",
                retry_after=DRAINING_RETRY_AFTER_S,
            )
        if self._num_samples and self._num_samples + samples > self._max_samples:
            raise NotAdmitted(
                f"the queue is full: {self._num_samples} samples are running or waiting",
                status=429,
                code="queue_full",
                retry_after=RETRY_AFTER_S,
            )
        start = max(self._now, self._clocks.get(client, 0))
        charged = prompt_tokens + samples * USUAL_ANSWER
        self._clocks[client] = start + charged
        self._num_tickets[client] = self._num_tickets.get(client, 0) + 1
        self._num_samples += samples
        return Ticket(client, samples, start, charged)

    def record_start(self, ticket: Ticket) -> None:
        """The request has its first token: no later request starts before it."""
        self._now = max(self._now, ticket.start)

    def release(self, ticket: Ticket) -> None:
        """End a request's admission, once. ``ticket.used`` corrects what the client was charged."""
        if ticket.released:
            return
        ticket.released = True
        if ticket.used is not None:
            self._clocks[ticket.client] += ticket.used - ticket.charged
        self._num_tickets[ticket.client] -= 1
        if not self._num_tickets[ticket.client]:  # an idle client keeps neither claim nor debt
            del self._num_tickets[ticket.client], self._clocks[ticket.client]
        self._num_samples -= ticket.samples
        if not self._num_samples:
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Admit no more, and wait until all are released; False after ``timeout`` seconds."""
        self.draining = True
        self._idle.clear()
        if self._num_samples:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                return False
        return True
