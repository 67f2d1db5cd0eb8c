"""Embed the engine in an asyncio application: stream, end the thinking early, cancel.

    python examples/async_embedding.py [MODEL]

Three requests run concurrently on one engine. Prints one line each: the answer of a streamed
request, the answer of one whose thinking was ended, and the tokens of a cancelled one.
"""

import asyncio
import sys
from contextlib import aclosing

from s1engine import AsyncLLMEngine, EngineConfig, SamplingParams, ThinkingBudget
from s1engine.outputs import Chunk, RequestOutput

CHAT = [{"role": "user", "content": "k=3 b=k+4 x=b*2 x?"}]
SHORT = SamplingParams(temperature=0, max_tokens=1024)
LONG = SamplingParams(temperature=0, max_tokens=1536, thinking=ThinkingBudget(min_tokens=1024))


async def stream(engine: AsyncLLMEngine) -> None:
    text = ""
    async for event in engine.generate(CHAT, SHORT, stream=True):
        if isinstance(event, Chunk):
            text += event.text  # event.reasoning holds the thinking
    print(f"streamed: {text.strip()}")


async def end_thinking(engine: AsyncLLMEngine) -> None:
    async for event in engine.generate(CHAT, LONG, stream=True, request_id="impatient"):
        if isinstance(event, Chunk) and event.reasoning:
            engine.end_thinking("impatient")  # a user pressed "answer now"
        elif isinstance(event, RequestOutput):
            (sample,) = event.outputs
            assert sample.thinking is not None
            print(f"ended by {sample.thinking.end_reason}: {sample.text.strip()}")


async def cancel(engine: AsyncLLMEngine) -> None:
    num_tokens = 0
    async with aclosing(engine.generate(CHAT, LONG, stream=True)) as events:
        async for event in events:
            num_tokens += len(event.token_ids) if isinstance(event, Chunk) else 0
            if num_tokens >= 20:
                break  # closing the generator aborts the request and frees its KV blocks
    print(f"cancelled after {num_tokens} tokens")


async def main() -> None:
    engine = AsyncLLMEngine(EngineConfig(model=sys.argv[1]) if sys.argv[1:] else EngineConfig())
    await engine.start()
    try:
        await asyncio.gather(stream(engine), end_thinking(engine), cancel(engine))
    finally:
        await engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
