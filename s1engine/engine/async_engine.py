"""The engine behind ``await``: one thread steps, any number of coroutines wait.

The thread owns the LLMEngine. Coroutines send it commands through a queue and get events back on
their own loop, one wake-up a step for all of them. A slow consumer delays nobody: its events wait
in its own queue.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.messages import EngineStats
from s1engine.engine.output_processor import RequestEvent
from s1engine.engine.request import Prompt, Request, RequestCompiler
from s1engine.engine.request_output import StreamEvent
from s1engine.errors import EngineDeadError, RequestFailedError
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

Command = Callable[[], object]
_Queue = asyncio.Queue[StreamEvent | RequestFailedError | None]
IDLE_S = 1.0  # between steps of an engine with nothing to do, which find out whether it is alive


class AsyncLLMEngine:
    """An LLMEngine with a thread of its own.

    Use: ``await start()``, then ``async for event in generate(...)``, in the end
    ``await shutdown()``. All calls from one event loop.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        self.engine = LLMEngine(config, progress=progress)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _Queue] = {}
        self._thread = threading.Thread(target=self._run, name="s1engine-step", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Starts the stepping thread, once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def config(self) -> EngineConfig:
        """What the engine was started with."""
        return self.engine.config

    @property
    def compiler(self) -> RequestCompiler:
        """Makes requests."""
        return self.engine.compiler

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        return self.engine.stats()

    @property
    def healthy(self) -> bool:
        """Is the thread there to step?"""
        return self._failure is None and self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if it was not ``shutdown``."""
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
        """Yields chunks and checkpoints if ``stream``, then the RequestOutput. Closing the
        generator aborts.

        ``options`` go to ``LLMEngine.make_request``. Raises RequestError before the first event,
        EngineDeadError if the engine fails, RequestFailedError if it fails with this one alone.
        """
        request = self.engine.make_request(prompt, params, stream=stream, **options)
        async with contextlib.aclosing(self.generate_request(request)) as events:
            async for event in events:
                yield event

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """``generate`` for a request that is compiled already."""
        events: _Queue = asyncio.Queue()
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
        """Tells a live request to answer now. False if there is no such request."""
        if request_id not in self._streams:
            return False
        self._commands.put(lambda: self.engine.end_thinking(request_id))
        return True

    # --- the stepping thread ---

    def _run(self) -> None:
        try:
            while self._obey():
                events = self.engine.step()
                if events:
                    self._call_soon(self._deliver, events)
        except Exception as error:
            logger.exception("the engine failed; no further request can be served")
            self._failure = error
        finally:
            self._call_soon(self._end_streams)

    def _obey(self) -> bool:
        """Carries out what is queued; waits if there is nothing to step, up to IDLE_S. False: shut
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
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
