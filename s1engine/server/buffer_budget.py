"""The memory of the server's process that clients may fill together, in one number.

Counted are bodies, as they come and parsed, and log-probabilities of answers, until the response
has been read or the client is gone. What a transport holds is bounded by http_protocol.py, and
texts of answers by the queue. Knows no HTTP.
"""

from s1engine.server.admission import NotAdmitted

MAX_BUFFERED_BYTES = 2**30
RETRY_AFTER_S = 1


class BufferBudget:
    """At most ``max_bytes`` in all leases together. All calls come from one event loop."""

    def __init__(self, max_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.used = 0


class BufferLease:
    """What one request has of a budget, until ``release``."""

    def __init__(self, budget: BufferBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Reserve more. Raises NotAdmitted if the budget is used up."""
        budget = self._budget
        if budget.used + num_bytes > budget.max_bytes:
            raise NotAdmitted(
                f"the server holds {budget.used} bytes for clients and may hold {budget.max_bytes}",
                status=503,
                code="buffers_full",
                retry_after=RETRY_AFTER_S,
            )
        budget.used += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Give all of it back."""
        self._budget.used -= self._num_bytes
        self._num_bytes = 0
