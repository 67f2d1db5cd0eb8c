"""The events of one request as an iterator, whose end in any way aborts the request."""

import contextlib
import weakref
from collections import deque
from typing import Self

from s1engine.engine.engine_thread import (
    EngineThread,
    MailQueue,
    Submission,
    SubmissionEvent,
    result_of,
)
from s1engine.engine.request import Request
from s1engine.engine.request_output import StreamEvent
from s1engine.errors import EngineDeadError
from s1engine.outputs import RequestOutput


class RequestStream:
    """Iterates over chunks and checkpoints, then the RequestOutput. One thread reads it.

    The engine computes ahead of the reader. ``close``, the end of a ``with`` block, an exception
    while it waits, and the garbage collection abort the request.

    Args:
        owner: kept alive with the stream.
    """

    def __init__(self, owner: object, thread: EngineThread, request: Request) -> None:
        self._owner: object | None = owner
        self._thread = thread
        self._mail = MailQueue()
        self._events: deque[SubmissionEvent] = deque()
        self._submission = Submission(request, self._mail.put)
        self._finalizer = weakref.finalize(self, thread.abort, [self._submission])
        self._finalizer.atexit = False
        thread.submit([self._submission])

    @property
    def request_id(self) -> str:
        """For ``LLM.cancel`` and ``LLM.end_thinking``."""
        return self._submission.request.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamEvent:
        """The next event. Raises RequestError if the id is taken, RequestFailedError or
        EngineDeadError."""
        if self._owner is None:
            raise StopIteration
        try:
            while not self._events:
                self._events.extend(event for _, event in self._mail.receive())
            event = self._events.popleft()
            if isinstance(event, Exception):
                raise event
        except BaseException:
            self.close()
            raise
        if isinstance(event, RequestOutput):
            self._end()
        return event

    def _end(self) -> None:
        self._finalizer.detach()
        self._owner = None

    def close(self) -> None:
        """Aborts the request unless it has ended, and waits until it is gone."""
        if self._owner is None:
            return
        aborted = self._thread.abort([self._submission])
        self._end()
        with contextlib.suppress(EngineDeadError):
            result_of(aborted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
