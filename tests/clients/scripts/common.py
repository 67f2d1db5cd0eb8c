"""What the scripts ask, and how they report: one JSON object on the last line of stdout."""

import json
import os
from typing import Any, Literal

URL = os.environ["OPENAI_BASE_URL"]  # ends in /v1
KEY = os.environ["OPENAI_API_KEY"]
MODEL = "s1-nano"
QUESTION = "a=3 b=a+4 c=b*2 c?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
NEXT_QUESTION = "k=3 b=k+4 b?"  # the result of the tool
CITY = Literal["Oslo", "Rome"]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "enum": [1, 2, 3]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "forecast", "description": "Weather.", "parameters": PARAMETERS},
}


def report(**results: Any) -> None:
    """Print the results. Their names choose the checks of test_clients.py."""
    print(json.dumps(results))


def usage_of(usage: Any) -> list[int]:
    """Return prompt, completion and total tokens of OpenAI's usage."""
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]
