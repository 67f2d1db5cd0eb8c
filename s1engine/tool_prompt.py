"""Tools in the words of a chat, for templates that do not know the variable ``tools``.

The model is told of the tools in the system message, or in the first question where the template
shows no system message. Calls and results of earlier turns become text. Knows no template.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
OPEN_RESULT, CLOSE_RESULT = "<tool_response>", "</tool_response>"

Message = dict[str, Any]


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return what a model must know to call these tools, in OpenAI's form."""
    functions = "\n".join(_json(tool.get("function", tool)) for tool in tools)
    return (
        f"You can call these functions:\n{functions}\n\n"
        "To call one, write its name and its arguments in this form, once for each call:\n"
        f'{OPEN}\n{{"name": "function name", "arguments": {{"argument": "value"}}}}\n{CLOSE}\n'
        f"Results come between {OPEN_RESULT} and {CLOSE_RESULT}. "
        "Answer directly if no function is needed."
    )


def without_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], in_system: bool
) -> list[Message]:
    """Return checked messages that say the same without tool roles and calls.

    Results that follow each other, and a question after them, become one message of the user:
    many templates demand that roles alternate.
    """
    texts: list[Message] = []
    after_result = False
    for message in messages:
        text = _as_text(message)
        if after_result and text["role"] == "user":
            joined = f"{texts[-1]['content']}\n{text['content']}"
            texts[-1] = {**texts[-1], "content": joined}
        else:
            texts.append(text)
        after_result = text["role"] == "user" and (after_result or message["role"] == "tool")
    return _with_description(texts, describe_tools(tools), in_system) if tools else texts


def _as_text(message: Message) -> Message:
    if message["role"] == "tool":
        content = f"{OPEN_RESULT}\n{message['content']}\n{CLOSE_RESULT}"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [f"{OPEN}\n{_json(call['function'])}\n{CLOSE}" for call in calls]
    content = "\n".join([*filter(None, [message["content"]]), *written])
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": content}


def _with_description(messages: list[Message], text: str, in_system: bool) -> list[Message]:
    if in_system and messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    role = "system" if in_system else "user"
    at = next((i for i, message in enumerate(messages) if message["role"] == role), None)
    if at is None:
        return [{"role": role, "content": text}, *messages]
    own = messages[at]["content"]
    content = f"{own}\n\n{text}" if in_system else f"{text}\n\n{own}"
    return [*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
