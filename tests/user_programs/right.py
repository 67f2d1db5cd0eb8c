"""What a user may write: ``mypy --strict`` finds no error."""

import asyncio
from pathlib import Path

import numpy as np

from s1engine import (
    LLM,
    AsyncLLMEngine,
    Chunk,
    EngineConfig,
    EngineOptions,
    Message,
    RequestError,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    ThinkingBudget,
)

OPTIONS: EngineOptions = {"dtype": "float32", "max_num_seqs": 8}
URGENT: RequestOptions = {"priority": -1, "request_id": "first"}


def offline(model: Path) -> list[str]:
    llm = LLM(model, **OPTIONS)
    params = SamplingParams(stop="\n", stop_token_ids=[1, 2], logit_bias={3: 1.0})
    budget = ThinkingBudget(max_tokens=16, checkpoints=[4, 8])
    structured = SamplingParams(json_schema={"type": "object"}, thinking=budget)
    texts: list[RequestOutput] = llm.generate(["a", "b"], [params, structured], priority=1)
    texts += llm.generate("a", params, **URGENT)
    texts += llm.generate([1, 2, 3])
    texts += llm.generate([[1, 2], [3]], params)
    texts += llm.generate(np.array([1, 2, 3]), params)
    texts += llm.generate((text for text in ("a", "b")), params)
    chat: list[Message] = [{"role": "user", "content": "hello"}]
    texts += llm.chat(chat, params, enable_thinking=False)
    texts += llm.chat([[{"role": "user", "content": "hello"}]])
    for event in llm.stream("a", params, cache_salt="mine"):
        if isinstance(event, Chunk):
            print(event.text, event.finish_reason == "length")
    try:
        llm.generate("a", SamplingParams(choice=("yes", "no")))
    except RequestError as error:
        print(error.param)
    llm.close()
    return [output.outputs[0].text for output in texts]


async def serve() -> None:
    async with AsyncLLMEngine(EngineConfig(dtype="float32")) as engine:
        async for event in engine.stream("a", SamplingParams(regex="[a-z]+"), priority=1):
            if isinstance(event, RequestOutput):
                print(event.usage.prompt_tokens, event.outputs[0].finish_reason)


if __name__ == "__main__":
    print(offline(Path("model")))
    asyncio.run(serve())
