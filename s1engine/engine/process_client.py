"""An engine in a process of its own, behind ``await``.

Here requests become integers and tokens become text; there is the model. A stream whose reader is
slow holds at most what its sequences have generated: what comes in meanwhile is joined and read as
one, so a slow reader gets fewer and larger chunks, and nobody else waits for it. The same happens
to all where making and sending their text takes this process too much of its time (REST). Steps
with forced tokens stay chunks of their own.
"""

import asyncio
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
    decode_core_outputs,
    request_number,
)
from s1engine.engine.messages import EngineStats
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import Request, RequestCompiler
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.errors import EngineDeadError, ModelError, RequestError, RequestFailedError
from s1engine.models.loader import resolve_model
from s1engine.outputs import RequestOutput, RowLogprobs

PROCESS = "s1engine.engine.engine_process"
STUCK_S = 60.0  # without a sign of life
END_S = 10.0  # for the process to end by itself
READ_BYTES = 2**18
# Pause between two rounds of text, as a multiple of what the first took, by device: where the
# engine computes on the processors, every moment that text takes is the engine's.
REST = {"cpu": 12.0, "cuda": 2.0}


class ProcessEngineClient:
    """What AsyncLLMEngine is, with the engine in another process. ``on_failure`` is called when
    that ends by itself.

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
        self._reader = messages.FrameReader()
        self._streams: dict[int, _Stream] = {}  # by number of the request
        self._numbers: dict[str, int] = {}
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
        self.compiler = RequestCompiler(text, ready.max_model_len)
        self._stats = ready.stats
        self._pacer = _Pacer(self._wake_readers, REST[ready.device])
        self._last_sign = time.monotonic()

    def _wait_until_ready(self) -> messages.Ready:
        bodies: list[bytes] = []
        while not bodies:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise EngineDeadError(f"the engine could not start ({self._process.wait()})")
            bodies = self._reader.feed(data)
        first, *rest = [messages.from_engine_decoder.decode(body) for body in bodies]
        assert not any(isinstance(message, messages.Outputs) for message in rest)
        if isinstance(first, messages.Ready):
            return first
        assert isinstance(first, messages.LoadFailed)
        if first.of_model:
            raise ModelError(first.message)
        raise RequestError(first.message, param=first.param)

    async def start(self) -> None:
        """Begins to listen, once."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        self._transport, _ = await loop.create_unix_connection(
            lambda: _Receiver(self), sock=self._socket
        )

    @property
    def healthy(self) -> bool:
        """Does the engine step, or could it?"""
        return self._failure is None and time.monotonic() - self._last_sign < STUCK_S

    @property
    def failure(self) -> EngineDeadError | None:
        """What ended the engine, if it was not ``shutdown``."""
        return self._failure

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """As of a second ago or less."""
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

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Yields chunks and checkpoints if the request streams, then its output. Closing the
        generator aborts. Raises EngineDeadError, RequestFailedError."""
        if self._failure is not None or self._closing:
            raise EngineDeadError("the engine is not running") from self._failure
        stream = _Stream(
            RequestOutputBuilder(request, self.compiler.text.tokenizer), self._collector
        )
        self._streams[request.number] = stream
        self._collector.open(request.number)
        self._numbers[request.request_id] = request.number
        self._send(messages.AddRequest(request))
        finished = False
        try:
            while not finished:
                for event in await stream.events():
                    finished = isinstance(event, RequestOutput)
                    yield event
        finally:
            self._collector.close(request.number)
            del self._streams[request.number], self._numbers[request.request_id]
            if not finished:
                self._send(messages.AbortRequest(request.request_id))

    def end_thinking(self, request_id: str) -> bool:
        """Tells a live request to answer now. False if there is no such request."""
        if request_id not in self._numbers:
            return False
        self._send(messages.EndThinking(request_id))
        return True

    def _send(self, message: messages.ToEngine) -> None:
        assert self._transport is not None, "not started"
        if not self._transport.is_closing():
            self._transport.write(messages.encode_frame(message))

    # --- what comes from the engine ---

    def receive(self, data: bytes) -> None:
        """Bytes from the engine's process."""
        self._last_sign = time.monotonic()
        for body in self._reader.feed(data):
            match messages.from_engine_decoder.decode(body):
                case messages.Outputs(step):
                    self._deliver(step)
                case messages.RequestFailed(number, message):
                    if (stream := self._streams.get(number)) is not None:
                        stream.fail(RequestFailedError(message))
                case messages.Heartbeat(stats):
                    self._stats = stats
                case messages.EngineDied(message):
                    self.fail(f"the engine failed: {message}")

    def _deliver(self, step: EngineCoreOutputs) -> None:
        for sequence in step.admitted:
            if (stream := self._streams.get(request_number(sequence))) is not None:
                stream.assembly.record_scheduled(step.start_time)
        for child in step.new_branches:
            if (stream := self._streams.get(request_number(child))) is not None:
                stream.assembly.add_branch(child)
        if step.logprobs:
            for progress in step.decode():
                if (stream := self._streams.get(request_number(progress.seq_id))) is not None:
                    stream.add_rows(progress)
        for number in self._collector.add(step.records):
            self._streams[number].see(step.end_time)
        if self._collector.has_pending:
            self._pacer.plan()

    def _wake_readers(self) -> None:
        for number in self._collector.pop_pending():
            self._streams[number].wake()

    def fail(self, message: str) -> None:
        """Nothing more will come."""
        if self._failure is not None:
            return
        failure = EngineDeadError(message)
        for stream in self._streams.values():
            stream.fail(failure)
        if not self._closing:
            self._failure = failure
            self.on_failure()


class _Receiver(asyncio.Protocol):
    def __init__(self, engine: ProcessEngineClient) -> None:
        self._engine = engine

    def data_received(self, data: bytes) -> None:
        self._engine.receive(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.fail("the engine's process has ended")


class _Pacer:
    """Wakes readers in rounds, and rests ``rest`` times as long as a round took before the next."""

    def __init__(self, wake: Callable[[], None], rest: float) -> None:
        self._wake = wake
        self._rest_factor = rest
        self._next = 0.0
        self._planned = False
        self._wanted = False  # while a round is not over

    def plan(self) -> None:
        """Has all who have news woken in the next round."""
        self._wanted = self._planned
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_at(self._next, self._round)

    def _round(self) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        self._wanted = False
        self._wake()
        loop.call_soon(self._rest, begin)  # after all that was woken

    def _rest(self, begin: float) -> None:
        loop = asyncio.get_running_loop()
        self._next = loop.time() + self._rest_factor * (loop.time() - begin)
        self._planned = False
        if self._wanted:
            self.plan()


class _Stream:
    """One request between the socket and whoever reads its events."""

    def __init__(self, assembly: RequestOutputBuilder, collector: _core.OutputCollector) -> None:
        self.assembly = assembly
        self._collector = collector
        self._rows: dict[int, list[RowLogprobs]] = {}  # by sequence, of tokens not read yet
        self._now = 0.0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def see(self, now: float) -> None:
        """A beginning or an end, which should not wait."""
        self.assembly.record_first_token(now)
        self._now = now
        self.wake()

    def add_rows(self, progress: EngineCoreOutput) -> None:
        """Keeps a step's log-probabilities until its tokens are read."""
        self._rows.setdefault(progress.seq_id, []).extend(progress.rows)

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def events(self) -> list[StreamEvent]:
        """What has come since the last call; waits for it."""
        while not (records := self._collector.collect(self.assembly.request.number)):
            if isinstance(self._failure, RequestFailedError):
                raise self._failure
            if self._failure is not None:
                raise EngineDeadError("the engine has stopped") from self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found: list[StreamEvent] = []
        for progress in decode_core_outputs(records):
            if (rows := self._rows.get(progress.seq_id)) is not None:
                progress.rows = rows[: progress.num_sampled]
                del rows[: progress.num_sampled]
            found += self.assembly.add(progress, self._now)
        return found
