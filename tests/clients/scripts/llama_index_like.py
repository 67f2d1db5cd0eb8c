"""llama-index: OpenAILike asked, streamed, with a tool, and with a structured answer."""

import json
from typing import Literal

from common import CITY, KEY, MODEL, QUESTION, URL, report
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Size(BaseModel):
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


def forecast(city: CITY, days: Literal[1, 2, 3]) -> str:
    """Weather."""
    return f"{city} {days}"


llm = OpenAILike(
    model=MODEL,
    api_base=URL,
    api_key=KEY,
    context_window=2048,
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    temperature=0,
    max_retries=0,
)
chat = [ChatMessage(role="user", content=QUESTION)]
whole = llm.chat(chat)
streamed = "".join(part.delta or "" for part in llm.stream_chat(chat))
called = llm.chat_with_tools(
    [FunctionTool.from_defaults(forecast)], user_msg=QUESTION, tool_required=True
)
call = llm.get_tool_calls_from_response(called)[0]
structured = llm.structured_predict(Size, PromptTemplate(QUESTION))
report(
    text=whole.message.content,
    whole=whole.message.content,
    streamed=streamed,
    tool={"name": call.tool_name, "arguments": json.dumps(call.tool_kwargs)},
    structured=structured.model_dump(),
    usage=[
        whole.raw.usage.prompt_tokens,
        whole.raw.usage.completion_tokens,
        whole.raw.usage.total_tokens,
    ],
)
