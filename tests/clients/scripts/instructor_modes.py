"""instructor: a model of pydantic by tools, by JSON schema, streamed in parts, and by Anthropic."""

import os
from typing import Literal

import instructor
from anthropic import Anthropic
from common import KEY, MESSAGES, MODEL, URL, report
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Size(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else any more keys may follow
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


openai = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
fields = {"model": MODEL, "messages": MESSAGES, "response_model": Size, "max_retries": 1}
tools = instructor.from_openai(openai, mode=instructor.Mode.TOOLS).create(**fields)
schema = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
by_schema, raw = schema.create_with_completion(**fields)
parts = list(
    schema.create_partial(
        model=MODEL, messages=MESSAGES, response_model=instructor.Partial[Size], max_retries=1
    )
)
anthropic = Anthropic(
    base_url=os.environ["ANTHROPIC_BASE_URL"], api_key=os.environ["ANTHROPIC_API_KEY"]
)
by_message = instructor.from_anthropic(anthropic).create(max_tokens=1000, **fields)
report(
    structured=by_schema.model_dump(),
    by_tools=tools.model_dump(),
    streamed_structure=parts[-1].model_dump(),
    by_message=by_message.model_dump(),
    usage=[raw.usage.prompt_tokens, raw.usage.completion_tokens, raw.usage.total_tokens],
)
