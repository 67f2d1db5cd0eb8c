"""What a server needs of an engine, wherever that runs."""

from collections.abc import AsyncGenerator
from typing import Protocol

from s1engine.config import EngineConfig
from s1engine.engine.messages import EngineStats
from s1engine.engine.request import Request, RequestCompiler
from s1engine.engine.request_output import StreamEvent


class EngineClient(Protocol):
    """AsyncLLMEngine is one in this process, ProcessEngineClient one in another."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def compiler(self) -> RequestCompiler: ...

    @property
    def healthy(self) -> bool:
        """Can it step?"""

    @property
    def failure(self) -> BaseException | None:
        """What ended it, if it was not ``shutdown``."""

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """Answers a request; closing the generator aborts it."""

    def end_thinking(self, request_id: str) -> bool: ...

    def stats(self) -> EngineStats: ...
