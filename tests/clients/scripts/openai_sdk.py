"""openai: a chat whole and streamed, a structured answer, a tool, a response and its successor."""

from typing import Literal

from common import KEY, MESSAGES, MODEL, QUESTION, TOOL, URL, report, usage_of
from openai import OpenAI
from pydantic import BaseModel


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)

whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
text = whole.choices[0].message.content

parts = client.chat.completions.create(
    model=MODEL,
    messages=MESSAGES,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"thinking_token_budget": 512},
)
streamed, stream_usage = "", None
for part in parts:
    streamed += (part.choices[0].delta.content or "") if part.choices else ""
    stream_usage = part.usage or stream_usage

parsed = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Size)
called = client.chat.completions.create(
    model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required"
)
call = called.choices[0].message.tool_calls[0]

first = client.responses.create(model=MODEL, input=QUESTION, temperature=0, store=True)
second = client.responses.create(
    model=MODEL, input="b=2 b?", temperature=0, previous_response_id=first.id
)
report(
    text=text,
    usage=usage_of(whole.usage),
    reasoning=whole.choices[0].message.reasoning,
    whole=text,
    streamed=streamed,
    stream_usage=usage_of(stream_usage),
    structured=parsed.choices[0].message.parsed.model_dump(),
    tool={"name": call.function.name, "arguments": call.function.arguments},
    response=first.output_text,
    next_response=second.output_text,
    response_usage=[
        first.usage.input_tokens,
        first.usage.output_tokens,
        first.usage.total_tokens,
    ],
)
