"""langchain-openai: ChatOpenAI called, streamed, with a tool, and with a structured answer."""

import json
from typing import Literal

from common import CITY, KEY, MODEL, QUESTION, URL, report
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


@tool
def forecast(city: CITY, days: Literal[1, 2, 3]) -> str:
    """Weather."""
    return f"{city} {days}"


llm = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_retries=0)
whole = llm.invoke(QUESTION)
streamed = "".join(part.content for part in llm.stream(QUESTION))
called = llm.bind_tools([forecast], tool_choice="any", strict=True).invoke(QUESTION)
structured = llm.with_structured_output(Size).invoke(QUESTION)
responses = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, use_responses_api=True)
usage = whole.usage_metadata
report(
    text=whole.content,
    usage=[usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]],
    whole=whole.content,
    streamed=streamed,
    tool={
        "name": called.tool_calls[0]["name"],
        "arguments": json.dumps(called.tool_calls[0]["args"]),
    },
    structured=structured.model_dump(),
    response=responses.invoke(QUESTION).text,
)
