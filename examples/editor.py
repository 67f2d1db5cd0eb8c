"""Completions in an editor: a key cancels the completion before it; the document is computed once.

    python examples/editor.py [MODEL]

Types a line at the end of a document, key by key, without waiting for completions. Prints what was
typed, how many completions were cancelled, how many tokens of the last prompt were reused, and the
last completion.
"""

import asyncio
import contextlib
import sys

from s1engine import AsyncLLMEngine, RequestOutput, SamplingParams

DOCUMENT = "".join(f"k={i} b=k+4 x=b*2 x?\n" for i in range(9))
LINE = "k=3 b=k+4 x=b*2 x?"
PARAMS = SamplingParams(temperature=0, max_tokens=24, stop="\n")


class Completer:
    """Keeps at most one completion running: that of the newest text."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._engine = engine
        self._task: asyncio.Task[RequestOutput] | None = None
        self.cancelled = 0

    async def type_key(self, text: str) -> None:
        """Cancels the completion of the text before, and starts that of ``text``."""
        if self._task is not None and self._task.cancel():
            self.cancelled += 1
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._task = asyncio.create_task(self._complete(text))
        await asyncio.sleep(0)  # the request starts

    async def _complete(self, text: str) -> RequestOutput:
        async with contextlib.aclosing(self._engine.generate(text, PARAMS)) as events:
            async for event in events:
                if isinstance(event, RequestOutput):
                    return event
        raise AssertionError("a request ends with its output")

    async def newest(self) -> RequestOutput:
        """The completion of the newest text."""
        assert self._task is not None
        return await self._task


async def main() -> None:
    async with AsyncLLMEngine(model=sys.argv[1] if sys.argv[1:] else None) as engine:
        document = await engine.prefill(DOCUMENT)  # it stays in the prefix cache
        completer = Completer(engine)
        for i in range(len(LINE)):
            await completer.type_key(DOCUMENT + LINE[: i + 1])
        output = await completer.newest()
        document.release()
        print(f"typed {LINE!r}; {completer.cancelled} completions cancelled")
        reused = output.usage.cached_tokens
        print(f"reused {reused} of {output.usage.prompt_tokens} tokens: {output.outputs[0].text!r}")


if __name__ == "__main__":
    asyncio.run(main())
