"""litellm: chats by the provider hosted_vllm and openai, streamed, a tool, a structured answer."""

import json
from typing import Literal

import litellm
from common import KEY, MESSAGES, MODEL, TOOL, URL, report, usage_of
from pydantic import BaseModel


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


fields = {"messages": MESSAGES, "api_base": URL, "api_key": KEY, "num_retries": 0}
whole = litellm.completion(model=f"openai/{MODEL}", temperature=0, **fields)
parts = litellm.completion(model=f"hosted_vllm/{MODEL}", temperature=0, stream=True, **fields)
streamed = "".join(part.choices[0].delta.content or "" for part in parts)
called = litellm.completion(
    model=f"hosted_vllm/{MODEL}", tools=[TOOL], tool_choice="required", **fields
)
call = called.choices[0].message.tool_calls[0].function
sized = litellm.completion(model=f"hosted_vllm/{MODEL}", response_format=Size, **fields)
thought = litellm.completion(model=f"hosted_vllm/{MODEL}", reasoning_effort="low", **fields)
report(
    text=whole.choices[0].message.content,
    usage=usage_of(whole.usage),
    whole=whole.choices[0].message.content,
    streamed=streamed,
    tool={"name": call.name, "arguments": call.arguments},
    structured=json.loads(sized.choices[0].message.content),
    reasoning=thought.choices[0].message.reasoning_content,
)
