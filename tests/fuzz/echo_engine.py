"""A model's text without a model, and an engine that answers with a few tokens at once."""

import functools
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from s1engine.config import EngineConfig
from s1engine.engine.core_output import EngineCoreOutput, EngineStats, sequence_id
from s1engine.engine.model_text import ModelText
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.engine.request_output import RequestOutputBuilder, StreamEvent
from s1engine.outputs import RowLogprobs

ANSWER = (40, 41, 42)
MAX_MODEL_LEN = 512


@functools.cache
def create_compiler() -> RequestCompiler:
    """The compiler of the bundled model. Grammars are not tried: that is a target of its own."""
    config = EngineConfig()
    compiler = RequestCompiler(ModelText.load(config, Path(config.model)), MAX_MODEL_LEN, config)
    validator = compiler.grammars.validator
    validator.validate = lambda grammar, param, wait=True: None  # type: ignore[method-assign]
    return compiler


class EchoEngine:
    """An EngineClient whose samples all end after ANSWER."""

    failure: BaseException | None = None
    healthy = True

    def __init__(self) -> None:
        self.config = EngineConfig()
        self.compiler = create_compiler()
        self.num_live = 0

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    def end_thinking(self, request_id: str) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(*[1] * len(EngineStats.__dataclass_fields__))

    async def generate_request(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """See EngineClient."""
        builder = RequestOutputBuilder(request, self.compiler.text.tokenizer)
        self.num_live += 1
        try:
            for index in range(request.params.n):
                for event in builder.add(_answer(request, index), time.monotonic()):
                    yield event
        finally:
            self.num_live -= 1


def _answer(request: Request, index: int) -> EngineCoreOutput:
    asked = request.params.logprobs
    top = tuple((token, -1.0) for token in range(asked or 0))
    rows = [] if asked is None else [RowLogprobs(-1.0, top) for _ in ANSWER]
    return EngineCoreOutput(
        seq_id=sequence_id(request.number, index),
        req_index=0,
        thinking_tokens=0,
        max_thinking=0,
        waits_used=0,
        num_cached=0,
        thinking=False,
        finish_reason="length",
        end_reason=None,
        num_held=0,
        token_ids=list(ANSWER),
        marks=bytes(len(ANSWER)),
        logprobs=rows,
    )
