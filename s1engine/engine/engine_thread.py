"""The thread that owns an LLMEngine: it alone calls the engine, every other thread sends commands.

Commands run between steps, in the order in which they came. Each request has a mailbox; its events
go there and nowhere else, with one call per step for all requests that share the mailbox. An idle
engine sleeps. Knows nothing of prompts and nothing of who waits: LLM and AsyncLLMEngine are its
faces.
"""

import atexit
import contextlib
import logging
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from s1engine.engine.core_output import EngineStats
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.output_processor import RequestEvent
from s1engine.engine.request import Request, id_is_taken
from s1engine.engine.request_output import StreamEvent
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import CheckpointOutput, Chunk

HEALTH_S = 1.0  # between health checks of an engine that is idle and has worker processes
QUIET_STEPS_S = 0.05  # of steps without output, before the thread looks at its commands
WAIT_S = 0.25  # a signal that arrives just before a wait does not end it, so waits are renewed
EXIT_S = 10.0  # the longest wait for a step when the interpreter exits

logger = logging.getLogger(__name__)

T = TypeVar("T")
# An exception, like a RequestOutput, is the last event of its request.
SubmissionEvent = StreamEvent | RequestFailedError | RequestError | EngineDeadError
Mailbox = Callable[[list[tuple["Submission", SubmissionEvent]]], object]


@dataclass(slots=True, eq=False)
class Submission:
    """A request, and the mailbox that receives its events, called on the engine's thread."""

    request: Request
    mailbox: Mailbox
    reader: Any = None  # of these events; for the owner of the mailbox


class MailQueue(queue.SimpleQueue[list[tuple[Submission, SubmissionEvent]]]):
    """Holds events until their reader wants them; ``put`` is a mailbox."""

    def receive(self) -> list[tuple[Submission, SubmissionEvent]]:
        """Waits for the events of a step. A signal (Ctrl-C) ends the wait."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.get(timeout=WAIT_S)


def result_of(future: "Future[T]") -> T:
    """Waits for a result, so that a signal (Ctrl-C) ends the wait. Raises what the call raised."""
    while not future.done():
        futures.wait([future], WAIT_S)
    return future.result()


@dataclass(slots=True)
class _Command:
    """``run`` on the engine's thread, or ``fail`` on any thread if the engine has ended."""

    run: Callable[[], object]
    fail: Callable[[], object]


class EngineThread:
    """Owns ``engine`` from now on, and closes it at the end.

    Any thread may call any method. A step that fails ends the thread: all requests and calls, later
    ones too, get an EngineDeadError with the cause. So do those of a thread that is closed, and
    those of a forked child, where the thread does not exist.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine: LLMEngine | None = engine
        self._stats = engine.stats()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._live: dict[str, Submission] = {}  # by request id; changed on the thread alone
        self._failure: BaseException | None = None
        self._ended = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="s1engine-step", daemon=True)
        self._thread.start()
        _threads.add(self)

    @property
    def engine(self) -> LLMEngine:
        """The engine, to be inspected; ``call`` is the way to change it. Raises EngineDeadError."""
        engine = self._engine
        if engine is None:
            raise self._dead_error()
        return engine

    @property
    def alive(self) -> bool:
        """True until the thread ends."""
        return not self._ended and os.getpid() == self._pid

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the thread; None if it was closed."""
        return self._failure

    @property
    def stats(self) -> EngineStats:
        """Load and counters after the last step or command."""
        return self._stats

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Adds requests. Never waits and never fails: errors are events. An id that a live request
        has is a RequestError."""
        self._send(_Command(partial(self._add, submissions), partial(self._refuse, submissions)))

    def abort(self, submissions: Sequence[Submission]) -> "Future[None]":
        """Ends the requests of ``submissions`` that are live; they get no further event."""
        return self.call_async(lambda _: self._abort(submissions))

    def cancel(self, request_id: str) -> "Future[bool]":
        """Ends a live request. Its last event is its output so far, or a RequestFailedError if its
        grammar was still being compiled. False: there is no such request."""
        return self.call_async(lambda engine: self._cancel(engine, request_id))

    def call_async(self, function: Callable[[LLMEngine], T]) -> "Future[T]":
        """Calls ``function(engine)`` between two steps. The future gets its result or error, or
        EngineDeadError. Never waits."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.engine))
            except BaseException as error:
                future.set_exception(error)

        def fail() -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._dead_error())

        self._send(_Command(run, fail))
        return future

    def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Calls ``function(engine)`` between two steps and waits. Raises what it raises, or
        EngineDeadError."""
        if threading.current_thread() is self._thread:
            return function(self.engine)
        future = self.call_async(function)
        try:
            return result_of(future)
        finally:
            future.cancel()  # after an interrupt it need not run

    def stop(self) -> None:
        """Ends the thread after its present step and the commands sent so far; does not wait."""
        if os.getpid() == self._pid:
            self._commands.put(None)
            self._interrupt()

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread as ``stop`` does, and waits up to ``timeout`` seconds for it."""
        self.stop()
        if threading.current_thread() is not self._thread and os.getpid() == self._pid:
            end = math.inf if timeout is None else time.monotonic() + timeout
            while self._thread.is_alive() and time.monotonic() < end:
                self._thread.join(WAIT_S)

    # --- on any thread ---

    def _send(self, command: _Command) -> None:
        if os.getpid() != self._pid:  # a lock of the queue may be held for ever here
            command.fail()
            return
        self._commands.put(command)
        self._interrupt()
        if self._ended:
            self._fail_commands()

    def _interrupt(self) -> None:
        """Makes the thread look at its commands after the present step."""
        engine = self._engine
        if engine is not None:
            engine.interrupt()

    def _fail_commands(self) -> None:
        """Fails the commands that no thread will run, each once."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                command.fail()

    def _dead_error(self) -> EngineDeadError:
        if os.getpid() != self._pid:
            return EngineDeadError(
                "this process is a fork: the engine runs in its parent; load one here, or spawn"
            )
        if self._failure is None:
            return EngineDeadError("the engine is closed")
        known = isinstance(self._failure, EngineDeadError)
        text = self._failure if known else f"the engine has failed: {self._failure!r}"
        error = EngineDeadError(str(text))
        error.__cause__ = self._failure
        return error

    def _refuse(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            self._post(submission.mailbox, [(submission, self._dead_error())])

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            while self._execute_commands():
                self._deliver(self.engine.step(QUIET_STEPS_S))
                self._stats = self.engine.stats()
        except BaseException as error:
            logger.exception("the engine failed; no further request can be served")
            self._failure = error
        finally:
            self._end()

    def _execute_commands(self) -> bool:
        """Executes the queued commands; an idle engine waits for one. False: stop."""
        engine = self.engine
        health = HEALTH_S if engine.config.tensor_parallel_size > 1 else None
        while True:
            idle = not engine.has_unfinished
            try:
                command = self._commands.get(idle, health)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.run()
            del command  # it may be the last owner of what its sender has dropped
            self._stats = engine.stats()

    def _end(self) -> None:
        self._ended = True
        submissions = list(self._live.values())
        self._live.clear()
        self._refuse(submissions)
        self._fail_commands()
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        except Exception:
            logger.exception("the engine could not be closed")

    def _add(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            request = submission.request
            try:
                if request.request_id in self._live:
                    raise id_is_taken(request)
                self.engine.add_request(request)
                self._live[request.request_id] = submission
            except RequestError as error:
                self._post(submission.mailbox, [(submission, error)])

    def _abort(self, submissions: Sequence[Submission]) -> None:
        for submission in submissions:
            request_id = submission.request.request_id
            if self._live.get(request_id) is submission:
                del self._live[request_id]
                self.engine.abort(request_id)

    def _cancel(self, engine: LLMEngine, request_id: str) -> bool:
        submission = self._live.pop(request_id, None)
        if submission is None:
            return False
        output = engine.abort(request_id)
        event = output or RequestFailedError("the request was cancelled before it started")
        self._post(submission.mailbox, [(submission, event)])
        return True

    def _deliver(self, events: list[RequestEvent]) -> None:
        mails: dict[Mailbox, list[tuple[Submission, SubmissionEvent]]] = {}
        for request_id, event in events:
            submission = self._live.get(request_id)
            if submission is None:
                continue  # its reader has left
            if not isinstance(event, Chunk | CheckpointOutput):
                del self._live[request_id]
            mails.setdefault(submission.mailbox, []).append((submission, event))
        for mailbox, mail in mails.items():
            self._post(mailbox, mail)

    def _post(self, mailbox: Mailbox, mail: list[tuple[Submission, SubmissionEvent]]) -> None:
        """A mailbox that raises loses its requests, and harms no other."""
        try:
            mailbox(mail)
        except Exception:
            logger.exception("a reader of events failed; its requests are aborted")
            if not self._ended:
                self._abort([submission for submission, _ in mail])


_threads: "weakref.WeakSet[EngineThread]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that still computes while the interpreter ends would crash it."""
    for thread in list(_threads):
        thread.close(EXIT_S)
