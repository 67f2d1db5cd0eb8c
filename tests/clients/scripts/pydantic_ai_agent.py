"""pydantic-ai: text, a stream, structured output with a tool; by chat, responses, messages."""

import os
from typing import Literal

from common import CITY, KEY, MODEL, NEXT_QUESTION, QUESTION, URL, report
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, Tool
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


calls: list[str] = []


def forecast(city: CITY) -> str:
    """Weather."""
    calls.append(city)
    return NEXT_QUESTION


async def at_most_once(context, definition):  # s1-nano would call it for ever
    return None if calls else definition


provider = OpenAIProvider(base_url=URL, api_key=KEY)
chat = OpenAIChatModel(MODEL, provider=provider)
responses = OpenAIResponsesModel(MODEL, provider=provider)
messages = AnthropicModel(
    MODEL,
    provider=AnthropicProvider(
        base_url=os.environ["ANTHROPIC_BASE_URL"], api_key=os.environ["ANTHROPIC_API_KEY"]
    ),
)
greedy = {"temperature": 0}
whole = Agent(chat, model_settings=greedy).run_sync(QUESTION)
with_stream = Agent(chat, model_settings=greedy).run_stream_sync(QUESTION)
streamed = "".join(with_stream.stream_text(delta=True))
by_tool = Agent(chat, output_type=Size).run_sync(QUESTION).output
once = Tool(forecast, prepare=at_most_once)
native = Agent(chat, output_type=NativeOutput(Size), tools=[once]).run_sync(QUESTION).output
usage = whole.usage
report(
    text=whole.output,
    whole=whole.output,
    streamed=streamed,
    structured=native.model_dump(),
    by_tools=by_tool.model_dump(),
    usage=[usage.input_tokens, usage.output_tokens, usage.total_tokens],
    response=Agent(responses).run_sync(QUESTION).output,
    message=Agent(messages, model_settings={"max_tokens": 500}).run_sync(QUESTION).output,
)
