"""Requests that fail alone: whatever is raised on behalf of one request ends that one.

Raised means a bug of ours, for what users get wrong is refused before. What concerns all, as a
failing step does, is not caught here and ends the engine.
"""

import contextlib
import logging
from collections.abc import Iterator

from s1engine.engine.live_request import LiveRequest
from s1engine.engine.request import Request
from s1engine.errors import RequestFailedError

logger = logging.getLogger(__name__)


class FailedRequests:
    """Those of one engine."""

    def __init__(self) -> None:
        self._failing: list[LiveRequest] = []  # to be dropped when no step is under way
        self._untold: list[tuple[Request, RequestFailedError]] = []

    def __bool__(self) -> bool:
        return bool(self._untold)

    @contextlib.contextmanager
    def isolate(self, live: LiveRequest) -> Iterator[None]:
        """What is raised within fails the live, and nobody else."""
        try:
            yield
        except Exception as error:
            self.add(live, error)

    def add(self, live: LiveRequest, error: Exception) -> None:
        """The live cannot go on. Its first failure counts."""
        if live not in self._failing:
            self._failing.append(live)
            self.report(live.request, error)

    def report(self, request: Request, error: Exception) -> None:
        """Whoever waits for the request shall know."""
        logger.error("request %s failed: %r", request.request_id, error, exc_info=error)
        failure = RequestFailedError("the engine could not go on with this request")
        failure.__cause__ = error
        self._untold.append((request, failure))

    def pop_failing(self) -> list[LiveRequest]:
        """Groups that are to be dropped."""
        failing, self._failing = self._failing, []
        return failing

    def pop_errors(self) -> list[tuple[Request, RequestFailedError]]:
        """What nobody has been told yet."""
        untold, self._untold = self._untold, []
        return untold
