"""The engine behind ``await``: one thread steps, any number of coroutines wait.

The thread owns the LLMEngine. Coroutines send it commands through a queue and receive events on
their own loop, with one wake-up per step for all of them. A slow consumer delays no other: its
events wait in its own queue.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineStats
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.output_processor import RequestEvent
from s1engine.engine.request import Prompt, Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.request_output import StreamEvent
from s1engine.errors import EngineDeadError, RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

Command = Callable[[], object]
_EventQueue = asyncio.Queue[StreamEvent | RequestFailedError | None]
IDLE_S = 1.0  # between steps of an idle engine; each step checks the health of its workers


class AsyncLLMEngine:
    """An EngineClient whose engine runs in a thread of this process.

    Use: ``await start()``, then ``async for event in generate(...)``, in the end
    ``await shutdown()``. All calls come from one event loop.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        self.engine = LLMEngine(config, progress=progress)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _EventQueue] = {}
        self._thread = threading.Thread(target=self._step_loop, name="s1engine-step", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Starts the stepping thread, once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def config(self) -> EngineConfig:
        """The resolved options of the engine."""
        return self.engine.config

    @property
    def compiler(self) -> RequestCompiler:
        """Compiles requests."""
        return self.engine.compiler

    def stats(self) -> EngineStats:
        """Load and counters of the engine."""
        return self.engine.stats()

    @property
    def healthy(self) -> bool:
        """True while the stepping thread runs."""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the thread; None after ``shutdown``."""
        return self._failure

    async def shutdown(self) -> None:
        """Ends the thread after its present step; open streams end with EngineDeadError."""
        self._commands.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.engine.close)

    async def generate(
        self, prompt: Prompt, params: SamplingParams, *, stream: bool = False, **options: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """Compiles a request and generates it, see ``generate_request``.

        ``options`` are those of ``LLMEngine.make_request``. Raises RequestError before the first
        event.
        """
        request = self.engine.make_request(prompt, params, stream=stream, **options)
        async with contextlib.aclosing(self.generate_request(request)) as events:
            async for event in events:
                yield event

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """See EngineClient."""
        events: _EventQueue = asyncio.Queue()
        if not self.healthy:
            raise EngineDeadError("the engine is not running") from self._failure
        assert request.request_id not in self._streams, "request id is taken"
        self._streams[request.request_id] = events
        self._commands.put(lambda: self.engine.add_request(request))
        finished = False
        try:
            while not finished:
                event = await events.get()
                if event is None:
                    raise EngineDeadError("the engine has stopped") from self._failure
                finished = isinstance(event, RequestOutput | RequestFailedError)
                if isinstance(event, RequestFailedError):
                    raise event
                yield event
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                self._commands.put(lambda: self.engine.abort(request.request_id))

    def end_thinking(self, request_id: str) -> bool:
        """See EngineClient."""
        if request_id not in self._streams:
            return False
        self._commands.put(lambda: self.engine.end_thinking(request_id))
        return True

    # --- the stepping thread ---

    def _step_loop(self) -> None:
        try:
            while self._execute_commands():
                events = self.engine.step()
                if events:
                    self._call_soon(self._deliver, events)
        except Exception as error:
            logger.exception("the engine failed; no further request can be served")
            self._failure = error
        finally:
            self._call_soon(self._end_streams)

    def _execute_commands(self) -> bool:
        """Executes the queued commands; an idle engine waits for one, up to IDLE_S. False: shut
        down."""
        while True:
            try:
                command = self._commands.get(not self.engine.has_unfinished, IDLE_S)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _call_soon(self, call: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: no reader is left
            self._loop.call_soon_threadsafe(call, *args)

    # --- on the event loop ---

    def _deliver(self, events: list[RequestEvent]) -> None:
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(event)

    def _end_streams(self) -> None:
        for stream in self._streams.values():
            stream.put_nowait(None)
