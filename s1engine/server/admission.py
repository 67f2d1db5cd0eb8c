"""Who may come in: a bounded number of samples at once, fairly between clients, and nobody once the
server is on its way out.

Fairness is start-time fair queueing: each client has a clock that runs ahead with the tokens it
asks for, and the scheduler takes the earliest start first. A client alone is first come, first
served; a client with a thousand requests does not delay another's first.
"""

import asyncio
from dataclasses import dataclass

MAX_QUEUED = 1024  # samples that wait while as many as can run do
RETRY_AFTER_S = 1  # of a full queue, seconds
DRAINING_RETRY_AFTER_S = 10  # until another instance is there
USUAL_ANSWER = 256  # tokens that a request is taken to generate until it has


class NotAdmitted(Exception):
    """Come back later.

    Attributes:
        status: 429 for a full queue, 503 for a server that drains.
        retry_after: seconds.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(slots=True)
class Ticket:
    """A place inside, to be given back."""

    client: str
    samples: int
    start: int  # order of the scheduler
    charged: int  # tokens
    used: int | None = None  # tokens, once all is generated
    finished: bool = False


class Admission:
    """The door. All calls from one event loop.

    Args:
        max_samples: samples inside at once, running or waiting.
    """

    def __init__(self, max_samples: int) -> None:
        self.draining = False
        self._max_samples = max_samples
        self._inside = 0
        self._now = 0  # start of the latest request that began to run
        self._clocks: dict[str, int] = {}
        self._tickets: dict[str, int] = {}  # clients with somebody inside
        self._emptied = asyncio.Event()

    @property
    def inside(self) -> int:
        """Samples that run or wait."""
        return self._inside

    def enter(self, client: str, samples: int, prompt_tokens: int) -> Ticket:
        """Raises NotAdmitted. A request for more samples than there are places comes in if it is
        alone."""
        if self.draining:
            raise NotAdmitted(
                "the server is shutting down",
                status=503,
                code="shutting_down",
                retry_after=DRAINING_RETRY_AFTER_S,
            )
        if self._inside and self._inside + samples > self._max_samples:
            raise NotAdmitted(
                f"the queue is full: {self._inside} samples are running or waiting",
                status=429,
                code="queue_full",
                retry_after=RETRY_AFTER_S,
            )
        start = max(self._now, self._clocks.get(client, 0))
        charged = prompt_tokens + samples * USUAL_ANSWER
        self._clocks[client] = start + charged
        self._tickets[client] = self._tickets.get(client, 0) + 1
        self._inside += samples
        return Ticket(client, samples, start, charged)

    def began(self, ticket: Ticket) -> None:
        """The request has its first token: nobody who comes now starts before it."""
        self._now = max(self._now, ticket.start)

    def leave(self, ticket: Ticket) -> None:
        """Gives a place back, once; ``ticket.used`` sets right what the client was charged."""
        if ticket.finished:
            return
        ticket.finished = True
        if ticket.used is not None:
            self._clocks[ticket.client] += ticket.used - ticket.charged
        self._tickets[ticket.client] -= 1
        if not self._tickets[ticket.client]:  # an idle client keeps no claim, and no debt either
            del self._tickets[ticket.client], self._clocks[ticket.client]
        self._inside -= ticket.samples
        if not self._inside:
            self._emptied.set()

    async def drain(self, timeout: float) -> bool:
        """Lets nobody in and waits until everybody is out; False if ``timeout`` seconds end it."""
        self.draining = True
        self._emptied.clear()
        if self._inside:
            try:
                await asyncio.wait_for(self._emptied.wait(), timeout)
            except TimeoutError:
                return False
        return True
