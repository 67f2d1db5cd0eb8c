"""The interface that a server needs of an engine, in whichever process that engine runs."""

from collections.abc import AsyncGenerator
from typing import Protocol

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineStats
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.request_output import StreamEvent


class EngineClient(Protocol):
    """Implemented by AsyncLLMEngine (this process) and ProcessEngineClient (another process)."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def compiler(self) -> RequestCompiler: ...

    @property
    def healthy(self) -> bool:
        """True while the engine can step."""

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine; None after ``shutdown``."""

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Yields chunks and checkpoints if the request streams, then its RequestOutput. Closing the
        generator aborts the request. Raises EngineDeadError or RequestFailedError."""

    def end_thinking(self, request_id: str) -> bool:
        """Ends the thinking of a live request. False if there is no such request."""

    def stats(self) -> EngineStats: ...
