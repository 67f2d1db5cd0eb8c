"""openai-agents: a forced tool, then an answer of an output type; a stream; responses and chat."""

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import CITY, KEY, MODEL, NEXT_QUESTION, QUESTION, URL, report
from openai import AsyncOpenAI
from pydantic import BaseModel


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


calls: list[str] = []


@function_tool(is_enabled=lambda context, agent: not calls)  # s1-nano would call it for ever
def forecast(city: CITY) -> str:
    """Weather."""
    calls.append(city)
    return NEXT_QUESTION


async def run(model, **fields):
    agent = Agent(name="nano", instructions="Be brief.", model=model, **fields)
    return await Runner.run(agent, QUESTION)


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    chat = OpenAIChatCompletionsModel(model=MODEL, openai_client=client)
    responses = OpenAIResponsesModel(model=MODEL, openai_client=client)
    greedy = ModelSettings(temperature=0)
    whole = await run(chat, model_settings=greedy)
    forced = ModelSettings(tool_choice="required", parallel_tool_calls=False)
    looped, counts = [], []
    for model in (chat, responses):  # first the call, then the answer: the choice is reset
        calls.clear()
        result = await run(model, tools=[forecast], output_type=Size, model_settings=forced)
        looped.append(result.final_output.model_dump())
        counts.append(len(calls))
    streaming = Runner.run_streamed(Agent(name="nano", model=responses), QUESTION)
    kinds = [event.type async for event in streaming.stream_events()]
    usage = whole.context_wrapper.usage
    report(
        text=whole.final_output,
        usage=[usage.input_tokens, usage.output_tokens, usage.total_tokens],
        structured=looped[0],
        by_response=looped[1],
        tool_calls=counts,
        response=streaming.final_output,
        stream_kinds=sorted(set(kinds)),
    )


asyncio.run(main())
