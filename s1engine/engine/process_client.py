"""The client of an engine that runs in a process of its own.

This process turns requests into token ids and tokens into text; the other holds the model. While a
stream is not read, the records that arrive for it are joined: a slow reader gets fewer, larger
chunks, holds no more memory than its tokens, and delays no other request. Where text takes too much
time of this process, all readers are slowed in the same way (READ_PAUSE). Steps with forced tokens
stay chunks of their own.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from s1engine import _core
from s1engine.config import EngineConfig
from s1engine.engine import messages
from s1engine.engine.core_output import (
    SEQUENCE_BITS,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineStats,
    HeldLogprobs,
    decode_core_outputs,
    request_number,
)
from s1engine.engine.engine_child import EngineChild, EngineConnection
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import Request, id_is_taken
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.engine.spawning import SpawnedProcess
from s1engine.engine.supervision import EngineWatchdog, RestartBudget, Supervision, Suspects
from s1engine.errors import (
    EngineDeadError,
    ModelError,
    RequestError,
    RequestFailedError,
    ShuttingDownError,
)
from s1engine.models.model_path import resolve_model
from s1engine.outputs import RequestOutput, RowLogprobs

TICK_S = 1.0  # of the watchdog
# Pause between two rounds of reading, as a multiple of the time that the first took, by device. An
# engine that computes on the CPU loses every moment that text takes.
READ_PAUSE = {"cpu": 12.0, "cuda": 2.0}

logger = logging.getLogger(__name__)


class ProcessEngineClient:
    """An EngineClient whose engine runs in another process.

    The constructor starts the process and waits until the model is loaded. Raises ModelError or
    RequestError as LLMEngine does, EngineDeadError if the process ends before.

    If that process ends by itself, is frozen or hangs, all streams end with EngineDeadError. Then
    another one is started while ``supervision`` allows (None: never); no request is sent again,
    because it may be the cause. Else ``on_failure`` is called.

    Args:
        spawned: the first process; None: the constructor starts it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = False,
        supervision: Supervision | None = None,
        spawned: SpawnedProcess | None = None,
    ) -> None:
        self.config = config
        self._limits = supervision or Supervision(engine_restarts=0)
        path = resolve_model(config.model)
        located = replace(config, model=str(path), served_model_name=config.model_names)
        self._start = messages.Start(located, progress)
        self._streams: dict[int, _RequestStream] = {}  # by number of the request
        self._numbers: dict[str, int] = {}  # by id of the request
        self._connection: EngineConnection | None = None
        self._cause: EngineDeadError | None = None  # why no engine runs now
        self._failure: EngineDeadError | None = None
        self._closing = False
        self._restart_budget = RestartBudget(self._limits.engine_restarts)
        self._suspects = Suspects()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_restarts = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._child = EngineChild(self._start, spawned)
        try:
            text = ModelText.load(config, path)
            ready = self._child.wait_until_ready()
        except BaseException:
            self._child.kill()
            raise
        self.compiler = RequestCompiler(text, ready.max_model_len, config)
        self._stats = ready.stats
        self._throttle = _ReadThrottle(self._wake_pending, READ_PAUSE[ready.device])

    async def start(self) -> None:
        """Starts to receive, once."""
        await self._connect()
        self._tasks = [asyncio.ensure_future(self._watch())]

    async def _connect(self) -> None:
        """Begins to receive from a process whose model is loaded."""
        self._collector = _core.OutputCollector(sequence_bits=SEQUENCE_BITS)
        self._watchdog = EngineWatchdog(self._limits)
        child = self._child
        child.socket.setblocking(False)
        _, self._connection = await asyncio.get_running_loop().create_unix_connection(
            lambda: EngineConnection(child, self._receive, self.fail), sock=child.socket
        )

    async def _watch(self) -> None:
        """Ends an engine that gives no sign of life, or whose step does not end."""
        while True:
            await asyncio.sleep(TICK_S)
            reason = self._watchdog.tick() if self._cause is None else None
            if reason is not None:
                self.fail(reason)

    @property
    def healthy(self) -> bool:
        """True while an engine runs."""
        return self._cause is None

    @property
    def failure(self) -> EngineDeadError | None:
        """The error that ended the last engine; None after ``shutdown`` and while one starts."""
        return self._failure

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._child.pid

    def stats(self) -> EngineStats:
        """At most a second old."""
        return self._stats

    def end_requests(self) -> None:
        """Ends all streams with ShuttingDownError; the engine goes on."""
        error = ShuttingDownError("the server shuts down")
        for stream in self._streams.values():
            stream.fail(error)

    async def shutdown(self) -> None:
        """Ends the process after its present step; open streams end with EngineDeadError."""
        self._closing = True
        self.fail("the engine is shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disconnect()
        await asyncio.to_thread(self._child.end)

    async def _disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    # --- the end of an engine ---

    def fail(self, message: str) -> None:
        """Ends all streams: the engine is lost. Starts another one, or calls ``on_failure``."""
        if self._cause is not None:
            return
        self._cause = EngineDeadError(message)
        pause = None if self._closing else self._restart_budget.next_pause()
        if pause is None and not self._closing:
            self._failure = self._cause  # before any response says that the engine is dead
        for stream in self._streams.values():
            stream.fail(self._cause)
        if self._closing:
            return
        logger.error("%s", message)
        self._suspects.accuse(stream.builder.request for stream in self._streams.values())
        self._tasks[1:] = [asyncio.ensure_future(self._restart(pause))]

    async def _restart(self, pause: float | None) -> None:
        """Replaces the engine by a new one, as often as the budget allows: first after ``pause``
        seconds, never if it is None."""
        while self._cause is not None:
            if pause is None:
                self._failure = self._cause
                self.on_failure()
            await self._disconnect()
            await asyncio.to_thread(self._child.kill)
            if pause is None:
                return
            logger.warning("the engine restarts in %g s", pause)
            await asyncio.sleep(pause)
            self._child = EngineChild(self._start)
            try:
                ready = await asyncio.to_thread(self._child.wait_until_ready)
            except (EngineDeadError, ModelError, RequestError) as error:
                logger.error("%s", error)
                pause = self._restart_budget.next_pause()
                continue
            self._num_restarts += 1
            self._stats = replace(ready.stats, num_restarts=self._num_restarts)
            self.compiler.max_model_len = ready.max_model_len
            await self._connect()
            self._cause = None
            logger.warning("the engine runs again")

    # --- requests ---

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """See EngineClient."""
        if self._cause is not None:
            raise EngineDeadError("the engine is not running") from self._cause
        if request.request_id in self._numbers:
            raise id_is_taken(request)
        if request.params.logits_processors:
            raise RequestError(
                "logits_processors are functions of this process, and the engine runs in another: "
                "embed the engine with LLM or AsyncLLMEngine",
                param="logits_processors",
            )
        if self._suspects.must_not_run(request):
            raise RequestFailedError(
                "two engines have died while they ran this request, so it is not run again"
            )
        builder = RequestOutputBuilder(request, self.compiler.text.tokenizer)
        collector, connection = self._collector, self._connection
        stream = _RequestStream(builder, collector)
        frame = messages.encode_frame(messages.AddRequest(request))
        assert connection is not None, "not started"
        finished = False
        try:
            self._numbers[request.request_id] = request.number
            collector.open(request.number)
            self._streams[request.number] = stream
            connection.write(frame)
            while not finished:
                for event in await stream.next_events():
                    finished = isinstance(event, RequestOutput)
                    yield event
        finally:
            self._numbers.pop(request.request_id, None)
            self._streams.pop(request.number, None)
            collector.close(request.number)
            if not finished:
                connection.send(messages.AbortRequest(request.request_id))

    def end_thinking(self, request_id: str) -> bool:
        """See EngineClient."""
        if request_id not in self._numbers or self._connection is None:
            return False
        self._connection.send(messages.EndThinking(request_id))
        return True

    # --- messages from the engine ---

    def _receive(self, message: messages.FromEngine) -> None:
        self._watchdog.record_sign()
        match message:
            case messages.Outputs(outputs):
                self._deliver(outputs)
            case messages.RequestFailed(number, text):
                if (stream := self._streams.get(number)) is not None:
                    stream.fail(RequestFailedError(text))
            case messages.Heartbeat(stalled):
                self._watchdog.record_stalled(stalled)
            case messages.StatsReport(stats):
                self._stats = replace(stats, num_restarts=self._num_restarts)
            case messages.EngineDied(text):
                self.fail(f"the engine failed: {text}")

    def _deliver(self, step: EngineCoreOutputs) -> None:
        for seq_id in step.admitted:
            if (stream := self._streams.get(request_number(seq_id))) is not None:
                stream.builder.record_scheduled(step.start_time)
        for seq_id in step.new_branches:
            if (stream := self._streams.get(request_number(seq_id))) is not None:
                stream.builder.sequence_output(seq_id)
        for part in step.prompt_logprobs:
            if (stream := self._streams.get(request_number(part.seq_id))) is not None:
                stream.builder.add_prompt_logprobs(part)
        if step.logprobs:
            for output in step.decode():
                if (stream := self._streams.get(request_number(output.seq_id))) is not None:
                    stream.add_logprobs(output)
        for number in self._collector.add(step.records):
            self._streams[number].wake_now(step.end_time)
        if self._collector.has_pending:
            self._throttle.request_round()

    def _wake_pending(self) -> None:
        for number in self._collector.pop_pending():
            self._streams[number].wake()


class _ReadThrottle:
    """Wakes readers in rounds, and pauses ``pause`` times as long as a round took before the
    next."""

    def __init__(self, wake: Callable[[], None], pause: float) -> None:
        self._wake = wake
        self._pause = pause
        self._next_round = 0.0
        self._scheduled = False
        self._requested = False  # while a round is not over

    def request_round(self) -> None:
        """Schedules a round as soon as the pause allows."""
        self._requested = self._scheduled
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_at(self._next_round, self._begin_round)

    def _begin_round(self) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        self._requested = False
        self._wake()
        loop.call_soon(self._end_round, begin)  # after all readers that were woken

    def _end_round(self, begin: float) -> None:
        loop = asyncio.get_running_loop()
        self._next_round = loop.time() + self._pause * (loop.time() - begin)
        self._scheduled = False
        if self._requested:
            self.request_round()


class _RequestStream:
    """One request between the socket and the reader of its events."""

    def __init__(self, builder: RequestOutputBuilder, collector: _core.OutputCollector) -> None:
        self.builder = builder
        self._collector = collector
        self._logprobs: dict[int, list[RowLogprobs]] = {}  # by sequence, of tokens not read yet
        self._held_logprobs: dict[int, HeldLogprobs] = {}  # by sequence
        self._now = 0.0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wake_now(self, now: float) -> None:
        """Wakes the reader for a first token or an end, which the throttle must not delay."""
        self.builder.record_first_token(now)
        self._now = now
        self.wake()

    def add_logprobs(self, output: EngineCoreOutput) -> None:
        """Keeps a step's log-probabilities until its tokens are read."""
        held = self._held_logprobs.setdefault(output.seq_id, HeldLogprobs())
        self._logprobs.setdefault(output.seq_id, []).extend(held.settle(output))

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_events(self) -> list[StreamEvent]:
        """Waits for records, and returns the events of all that arrived since the last call."""
        while not (records := self._collector.collect(self.builder.request.number)):
            if isinstance(self._failure, RequestFailedError | ShuttingDownError):
                raise self._failure
            if self._failure is not None:
                raise EngineDeadError("the engine has stopped") from self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events: list[StreamEvent] = []
        for output in decode_core_outputs(records):
            if (rows := self._logprobs.get(output.seq_id)) is not None:
                output.logprobs = rows[: output.num_sampled]
                del rows[: output.num_sampled]
            events += self.builder.add(output, self._now)
        return events
