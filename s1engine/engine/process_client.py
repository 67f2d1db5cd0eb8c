"""The client of an engine that runs in a process of its own.

This process turns requests into token ids and tokens into text; the other holds the model. While a
stream is not read, the records that arrive for it are joined: a slow reader gets fewer, larger
chunks, holds no more memory than its tokens, and delays no other request. Where text takes too much
time of this process, all readers are slowed in the same way (READ_PAUSE). Steps with forced tokens
stay chunks of their own.
"""

import asyncio
import logging
import socket
import subprocess
import sys
import time
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
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import Request, id_is_taken
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.errors import EngineDeadError, ModelError, RequestError, RequestFailedError
from s1engine.models.model_path import resolve_model
from s1engine.outputs import RequestOutput, RowLogprobs

PROCESS = "s1engine.engine.engine_process"
STUCK_S = 60.0  # without a sign of life
END_S = 10.0  # for the process to end by itself
READ_BYTES = 2**18
# Pause between two rounds of reading, as a multiple of the time that the first took, by device. An
# engine that computes on the CPU loses every moment that text takes.
READ_PAUSE = {"cpu": 12.0, "cuda": 2.0}

logger = logging.getLogger(__name__)


class ProcessEngineClient:
    """An EngineClient whose engine runs in another process. ``on_failure`` is called when that
    process ends by itself.

    The constructor starts the process and waits until the model is loaded. Raises ModelError or
    RequestError as LLMEngine does, EngineDeadError if the process ends before.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        self.config = config
        path = resolve_model(config.model)
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        logger.debug("engine process %d started", self._process.pid)
        self._frames = messages.FrameReader()
        self._streams: dict[int, _RequestStream] = {}  # by number of the request
        self._numbers: dict[str, int] = {}  # by id of the request
        self._transport: asyncio.WriteTransport | None = None
        self._failure: EngineDeadError | None = None
        self._closing = False
        self._collector = _core.OutputCollector(sequence_bits=SEQUENCE_BITS)
        self.on_failure: Callable[[], None] = lambda: None
        try:
            located = replace(config, model=str(path), served_model_name=config.model_name)
            self._socket.sendall(messages.encode_frame(messages.Start(located, progress)))
            text = ModelText.load(config, path)
            ready = self._wait_until_ready()
        except BaseException:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            raise
        self.compiler = RequestCompiler(text, ready.max_model_len, config)
        self._stats = ready.stats
        self._throttle = _ReadThrottle(self._wake_pending, READ_PAUSE[ready.device])
        self._last_sign = time.monotonic()

    def _wait_until_ready(self) -> messages.Ready:
        bodies: list[bytes] = []
        while not bodies:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise EngineDeadError(f"the engine could not start ({self._process.wait()})")
            bodies = self._frames.feed(data)
        first, *rest = [messages.from_engine_decoder.decode(body) for body in bodies]
        assert not any(isinstance(message, messages.Outputs) for message in rest)
        if isinstance(first, messages.Ready):
            return first
        assert isinstance(first, messages.LoadFailed)
        if first.of_model:
            raise ModelError(first.message)
        raise RequestError(first.message, param=first.param)

    async def start(self) -> None:
        """Starts to receive, once."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        self._transport, _ = await loop.create_unix_connection(
            lambda: _EngineConnection(self), sock=self._socket
        )

    @property
    def healthy(self) -> bool:
        """True while the engine gives signs of life."""
        return self._failure is None and time.monotonic() - self._last_sign < STUCK_S

    @property
    def failure(self) -> EngineDeadError | None:
        """The error that ended the engine; None after ``shutdown``."""
        return self._failure

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """At most a second old."""
        return self._stats

    async def shutdown(self) -> None:
        """Ends the process after its present step; open streams end with EngineDeadError."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
        try:
            await asyncio.to_thread(self._process.wait, END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        logger.debug("engine process %d ended", self._process.pid)

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """See EngineClient."""
        if self._failure is not None or self._closing:
            raise EngineDeadError("the engine is not running") from self._failure
        if request.request_id in self._numbers:
            raise id_is_taken(request)
        if request.params.logits_processors:
            raise RequestError(
                "logits_processors are functions of this process, and the engine runs in another: "
                "embed the engine with LLM or AsyncLLMEngine",
                param="logits_processors",
            )
        builder = RequestOutputBuilder(request, self.compiler.text.tokenizer)
        stream = _RequestStream(builder, self._collector)
        frame = messages.encode_frame(messages.AddRequest(request))
        finished = False
        try:
            self._numbers[request.request_id] = request.number
            self._collector.open(request.number)
            self._streams[request.number] = stream
            self._write(frame)
            while not finished:
                for event in await stream.next_events():
                    finished = isinstance(event, RequestOutput)
                    yield event
        finally:
            self._numbers.pop(request.request_id, None)
            self._streams.pop(request.number, None)
            self._collector.close(request.number)
            if not finished:
                self._send(messages.AbortRequest(request.request_id))

    def end_thinking(self, request_id: str) -> bool:
        """See EngineClient."""
        if request_id not in self._numbers:
            return False
        self._send(messages.EndThinking(request_id))
        return True

    def _send(self, message: messages.ToEngine) -> None:
        self._write(messages.encode_frame(message))

    def _write(self, frame: bytes) -> None:
        assert self._transport is not None, "not started"
        if not self._transport.is_closing():
            self._transport.write(frame)

    # --- messages from the engine ---

    def receive(self, data: bytes) -> None:
        """Handles bytes from the engine's process."""
        self._last_sign = time.monotonic()
        for body in self._frames.feed(data):
            match messages.from_engine_decoder.decode(body):
                case messages.Outputs(outputs):
                    self._deliver(outputs)
                case messages.RequestFailed(number, message):
                    if (stream := self._streams.get(number)) is not None:
                        stream.fail(RequestFailedError(message))
                case messages.Heartbeat(stats):
                    self._stats = stats
                case messages.EngineDied(message):
                    self.fail(f"the engine failed: {message}")

    def _deliver(self, step: EngineCoreOutputs) -> None:
        for seq_id in step.admitted:
            if (stream := self._streams.get(request_number(seq_id))) is not None:
                stream.builder.record_scheduled(step.start_time)
        for seq_id in step.new_branches:
            if (stream := self._streams.get(request_number(seq_id))) is not None:
                stream.builder.sequence_output(seq_id)
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

    def fail(self, message: str) -> None:
        """Ends all streams: the engine sends nothing more."""
        if self._failure is not None:
            return
        failure = EngineDeadError(message)
        for stream in self._streams.values():
            stream.fail(failure)
        if not self._closing:
            self._failure = failure
            self.on_failure()


class _EngineConnection(asyncio.Protocol):
    def __init__(self, client: ProcessEngineClient) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.receive(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.fail("the engine's process has ended")


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
            if isinstance(self._failure, RequestFailedError):
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
