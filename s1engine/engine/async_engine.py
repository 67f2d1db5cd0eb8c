"""The engine behind ``await``: any number of coroutines wait for requests of one engine thread.

Events reach a loop with one wake-up per step for all of its requests. A slow consumer delays no
other: its events wait in its own queue.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Self, TypeVar, Unpack

from s1engine.config import EngineConfig
from s1engine.engine.embedded import EmbeddedEngine
from s1engine.engine.engine_thread import Submission, SubmissionEvent
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.prefix import PinnedPrefix, prefill
from s1engine.engine.request import Request, id_is_taken
from s1engine.engine.request_output import StreamEvent
from s1engine.engine.session import RestoredSession, restore_session, save_session
from s1engine.engine.warm_up import WARM_SEQS, warm_up
from s1engine.errors import EngineDeadError, RequestError
from s1engine.options import EngineOptions, Prompt, RequestOptions, engine_config
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams

T = TypeVar("T")
_EventQueue = asyncio.Queue[SubmissionEvent]


class AsyncLLMEngine(EmbeddedEngine):
    """An EngineClient whose engine runs in a thread of this process.

    Use: ``async with AsyncLLMEngine(config) as engine``, or ``await start()`` and in the end
    ``await shutdown()``, after which ``start`` loads it again. The model is loaded off the event
    loop. Coroutines of any loop may use it.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        progress: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        """``model`` and ``options``: fields of EngineConfig, instead of ``config``. Raises
        RequestError."""
        if config is None:
            config = engine_config(model, options)
        elif not isinstance(config, EngineConfig):
            message = f"config must be an EngineConfig, got {type(config).__name__}"
            raise RequestError(message, param="config")
        elif model is not None or options:
            raise RequestError("either config or options", param=next(iter(options), "model"))
        super().__init__(config, progress=progress)
        self._live: dict[str, Submission] = {}  # by request id

    async def start(self) -> None:
        """Loads the model in another thread; does nothing if the engine runs. Raises ModelError and
        RequestError, as LLM."""
        try:
            await asyncio.to_thread(self._open)
        except asyncio.CancelledError:  # the load goes on, and is undone
            threading.Thread(target=self._close, name="s1engine-close", daemon=True).start()
            raise

    async def shutdown(self) -> None:
        """Ends the engine after its present step and frees its memory; open streams end with
        EngineDeadError. Does nothing if it is closed."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[StreamEvent, None]:
        """Compiles a request and generates it, see ``generate_request``.

        ``params`` None: the model's own defaults. Raises RequestError before the first event.
        """
        request = self._compile(prompt, params, stream, options)
        async with contextlib.aclosing(self.generate_request(request)) as events:
            async for event in events:
                yield event

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[StreamEvent, None]:
        """``generate`` with chunks and checkpoints before the RequestOutput."""
        return self.generate(prompt, params, stream=True, **options)

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """See EngineClient."""
        thread = self.thread
        if not thread.alive:
            raise EngineDeadError("the engine is not running") from thread.failure
        events: _EventQueue = asyncio.Queue()
        mailbox = _LoopMailbox(asyncio.get_running_loop())
        submission = Submission(request, mailbox, events)
        if self._live.setdefault(request.request_id, submission) is not submission:
            raise id_is_taken(request)
        finished = False
        try:
            thread.submit([submission])
            while not finished:
                event = await events.get()
                finished = isinstance(event, RequestOutput | Exception)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            del self._live[request.request_id]
            if not finished:
                thread.abort([submission])

    def end_thinking(self, request_id: str) -> bool:
        """See EngineClient."""
        if request_id not in self._live:
            return False
        self.thread.call_async(lambda engine: engine.end_thinking(request_id))
        return True

    async def cancel(self, request_id: str) -> bool:
        """Ends a live request; its reader gets the output so far, with the finish reason "abort".
        False if there is no such request."""
        return await asyncio.wrap_future(self.thread.cancel(request_id))

    async def prefill(
        self, prompt: Prompt | RequestOutput, **options: Unpack[RequestOptions]
    ) -> PinnedPrefix:
        """Computes and pins a prefix off the loop; see ``LLM.prefill``."""
        return await asyncio.to_thread(prefill, self, prompt, options)

    async def save_session(
        self,
        prompt: Prompt | RequestOutput,
        path: str | os.PathLike[str],
        **options: Unpack[RequestOptions],
    ) -> int:
        """Writes a session off the loop; see ``LLM.save_session``."""
        return await asyncio.to_thread(save_session, self, prompt, path, options)

    async def restore_session(
        self, path: str | os.PathLike[str], *, pin: bool = False, cache_salt: str | None = None
    ) -> RestoredSession:
        """Restores a session off the loop; see ``LLM.restore_session``."""
        options: RequestOptions = {"cache_salt": cache_salt}
        return await asyncio.to_thread(restore_session, self, path, pin, options)

    async def warmup(self, num_seqs: int = WARM_SEQS) -> None:
        """Prepares what the first requests would; see ``LLM.warmup``."""
        await asyncio.to_thread(warm_up, self, num_seqs)

    async def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Calls ``function(engine)`` on the engine's thread, between two steps. Raises what it
        raises."""
        return await asyncio.wrap_future(self.thread.call_async(function))


@dataclass(frozen=True, slots=True)
class _LoopMailbox:
    """Of all requests of one event loop: equal mailboxes are one."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, mail: list[tuple[Submission, SubmissionEvent]]) -> None:
        self.loop.call_soon_threadsafe(_deliver, mail)


def _deliver(mail: list[tuple[Submission, SubmissionEvent]]) -> None:
    for submission, event in mail:
        submission.reader.put_nowait(event)
