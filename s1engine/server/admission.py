"""Admission control: bounds sequences in flight, shares them among API keys, drains.

A client is an API key, or everybody if there are no keys. Of several clients none may have more
sequences in flight than are free, so a client that floods the queue leaves room for the others.
Which of the admitted sequences runs next is the scheduler's decision (csrc/core/fair_queue.hpp).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from s1engine.errors import RequestError

MAX_QUEUED = 1024  # sequences that wait while as many as can run do
MAX_REQUEST_SEQUENCES = 1024  # sequences that one request may become
RETRY_AFTER_S = 1  # seconds, while the queue is full
DRAINING_RETRY_AFTER_S = 10  # until another instance runs


class NotAdmitted(Exception):
    """The request is rejected for now.

    Attributes:
        status: 429 if the queue or the client's part of it is full, 503 if the server drains.
        retry_after: seconds.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientLimits:
    """What clients may ask for. A sequence is a sample, or the answer of one at a checkpoint."""

    max_in_flight: int
    """Sequences of all clients, running or queued."""
    num_clients: int = 1
    """Number of API keys; 1 without keys."""
    max_per_client: int | None = None
    """Sequences of one client, running or queued; None: one client may have all, several clients
    as many as are free."""
    max_per_request: int = MAX_REQUEST_SEQUENCES
    priority_clients: frozenset[str] | None = None
    """Clients that may ask for a priority below 0, before others; None: all."""

    @property
    def largest_request(self) -> int:
        """Sequences of the largest request that is admitted while nothing else is in flight."""
        largest = self.max_per_request
        if self.num_clients > 1:
            largest = min(largest, max(self.max_in_flight // 2, 1))
        return largest if self.max_per_client is None else min(largest, self.max_per_client)

    def check_priority(self, client: str, priority: int) -> None:
        """Raises RequestError if the client may not ask for this priority."""
        allowed = self.priority_clients
        if priority < 0 and allowed is not None and client not in allowed:
            raise RequestError(
                f"priority: this API key may not ask for {priority}; 0 and above are allowed",
                param="priority",
                code="priority_not_allowed",
            )


@dataclass(slots=True)
class Ticket:
    """An admitted request, to be released."""

    client: str
    sequences: int
    released: bool = False


class Admission:
    """Admits and releases requests. All calls come from one event loop."""

    def __init__(self, limits: ClientLimits) -> None:
        self.draining = False
        self.limits = limits
        self._num_in_flight = 0
        self._in_flight: dict[str, int] = {}  # sequences of each client that has any
        self._idle = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        """Sequences that run or wait."""
        return self._num_in_flight

    @property
    def in_flight(self) -> Mapping[str, int]:
        """The same of each client that has any."""
        return self._in_flight

    def admit(self, client: str, sequences: int) -> Ticket:
        """Admit a request. Raises NotAdmitted.

        A request for more than ``max_in_flight`` is admitted if it is alone.
        """
        if self.draining:
            raise NotAdmitted(
                "the server is shutting down",
                status=503,
                code="shutting_down",
                retry_after=DRAINING_RETRY_AFTER_S,
            )
        self._check_room(client, sequences)
        ticket = Ticket(client, sequences)  # may fail, so it comes first
        self._in_flight[client] = self._in_flight.get(client, 0) + sequences
        self._num_in_flight += sequences
        return ticket

    def _check_room(self, client: str, sequences: int) -> None:
        limits, own = self.limits, self._in_flight.get(client, 0)
        free = limits.max_in_flight - self._num_in_flight - sequences
        if self._num_in_flight and free < 0:
            message = f"the queue is full: {self._num_in_flight} sequences are running or waiting"
            raise NotAdmitted(message, status=429, code="queue_full", retry_after=RETRY_AFTER_S)
        most = own + sequences if limits.max_per_client is None else limits.max_per_client
        if limits.num_clients > 1 and self._num_in_flight:
            most = min(most, free)
        if own + sequences > most:
            raise NotAdmitted(
                f"this API key has {own} sequences running or waiting; {sequences} more do not fit "
                "into its part of the queue",
                status=429,
                code="key_queue_full",
                retry_after=RETRY_AFTER_S,
            )

    def release(self, ticket: Ticket) -> None:
        """End a request's admission, once."""
        if ticket.released:
            return
        ticket.released = True
        client = ticket.client
        self._in_flight[client] -= ticket.sequences
        self._num_in_flight -= ticket.sequences
        if not self._in_flight[client]:
            del self._in_flight[client]
        if not self._num_in_flight:
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Admit no more, and wait until all are released; False after ``timeout`` seconds."""
        self.draining = True
        self._idle.clear()
        if self._num_in_flight:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                return False
        return True
