"""anthropic: a message whole and streamed, a thinking budget, a tool, the tool runner, a count."""

import json

from anthropic import Anthropic, beta_tool
from common import CITY, MESSAGES, MODEL, NEXT_QUESTION, PARAMETERS, report

client = Anthropic(max_retries=0)  # ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


thinking = {"type": "enabled", "budget_tokens": 1024}
greedy = {"temperature": 0}  # the client has no argument of this name
fields = {"model": MODEL, "max_tokens": 1500, "messages": MESSAGES, "extra_body": greedy}
whole = client.messages.create(**fields, thinking=thinking)
with client.messages.stream(**fields, thinking=thinking) as stream:
    streamed = "".join(stream.text_stream)
    final = stream.get_final_message()

tool = {"name": "forecast", "description": "Weather.", "input_schema": PARAMETERS}
called = client.messages.create(**fields, tools=[tool], tool_choice={"type": "any"})
call = next(block for block in called.content if block.type == "tool_use")


@beta_tool
def forecast(city: CITY) -> str:
    """Weather.

    Args:
        city: where.
    """
    ran.append(city)
    return NEXT_QUESTION


ran: list[str] = []
# Its first answer may call the tool or not; a forced call would be forced in each round.
last = client.beta.messages.tool_runner(**fields, tools=[forecast]).until_done()

count = client.messages.count_tokens(model=MODEL, messages=MESSAGES)
report(
    text=text_of(whole),
    reasoning=next(block.thinking for block in whole.content if block.type == "thinking"),
    whole=text_of(whole),
    streamed=streamed,
    tool={"name": call.name, "arguments": json.dumps(call.input)},
    runner_text=text_of(last),
    counted=count.input_tokens,
    input_tokens=[
        message.usage.input_tokens + message.usage.cache_read_input_tokens
        for message in (whole, final)
    ],
)
