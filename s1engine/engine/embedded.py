"""What LLM and AsyncLLMEngine have in common: options, and the engine thread that they start and
close, and requests for it.

Knows no events.
"""

import threading
import weakref
from typing import Unpack

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineStats
from s1engine.engine.engine_thread import EngineThread
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.errors import EngineDeadError
from s1engine.options import Prompt, RequestOptions, check_option_names
from s1engine.sampling_params import SamplingParams


class EmbeddedEngine:
    """An engine in a thread of this process. It may be closed and opened again, by any thread.

    The thread ends with ``close``, with the garbage collection of this object, or with the
    interpreter.
    """

    def __init__(self, config: EngineConfig, *, progress: bool) -> None:
        self._given = config
        self._progress = progress
        self._opening = threading.Lock()
        self._thread: EngineThread | None = None
        self._finalizer = weakref.finalize(self, lambda: None)

    def _open(self) -> None:
        """Loads the model and starts the thread, unless one runs. A thread that has failed is
        replaced."""
        with self._opening:
            if self._thread is not None and self._thread.alive:
                return
            self._finalizer.detach()
            self._thread = thread = EngineThread(LLMEngine(self._given, progress=self._progress))
            self._finalizer = weakref.finalize(self, thread.stop)

    def _close(self) -> None:
        """Ends the thread after its present step, and drops all references to the engine."""
        with self._opening:
            if self._thread is not None:
                self._thread.close()
                self._finalizer.detach()
            self._thread = None

    @property
    def thread(self) -> EngineThread:
        """The thread. Raises EngineDeadError if there is none."""
        thread = self._thread
        if thread is None:
            raise EngineDeadError("the engine is closed or was never started; start() loads it")
        return thread

    @property
    def engine(self) -> LLMEngine:
        """The engine, to be inspected while it is idle; ``call`` is the way to use it. Raises
        EngineDeadError."""
        return self.thread.engine

    @property
    def config(self) -> EngineConfig:
        """The resolved options of the engine; the given ones while it is closed."""
        thread = self._thread
        return self._given if thread is None or not thread.alive else thread.engine.config

    @property
    def compiler(self) -> RequestCompiler:
        """Compiles requests, on any thread. Raises EngineDeadError."""
        return self.thread.engine.compiler

    def stats(self) -> EngineStats:
        """Load and counters after the last step or command. Raises EngineDeadError if closed."""
        return self.thread.stats

    @property
    def healthy(self) -> bool:
        """True while the engine can step."""
        thread = self._thread
        return thread is not None and thread.alive

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine; None if it runs or was closed."""
        thread = self._thread
        return None if thread is None else thread.failure

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Compiles a request; any thread may do so. ``params`` None: the model's own defaults.
        Raises RequestError."""
        return self._compile(prompt, params, stream, options)

    def _compile(
        self, prompt: Prompt, params: SamplingParams | None, stream: bool, options: RequestOptions
    ) -> Request:
        check_option_names(options, RequestOptions.__annotations__)
        compiler = self.compiler
        if params is None:
            params = SamplingParams(**compiler.default_sampling())
        return compiler.compile(prompt, params, stream=stream, **options)
