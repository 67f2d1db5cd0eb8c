"""Input items of the Responses API, converted to the messages of a chat.

Items of one turn of the assistant become one message: calls join the message before them, and
reasoning the message or call after it. Custom calls become calls of a function with one argument.
"""

import base64
import binascii
import json
from collections.abc import Iterable
from typing import Any

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObject
from s1engine.server.api.free_text import INPUT
from s1engine.server.api.response_tools import ResponseTools

TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
SEALED = "s1engine:"  # begin of our encrypted_content


class ChatTurns:
    """The messages that items become.

    Args:
        tools: of the request, for the names that the model sees.
    """

    def __init__(self, tools: ResponseTools) -> None:
        self._tools = tools
        self._reasoning = ""  # of the next message or call
        self.messages: list[JsonObject] = []
        self.places: list[str] = []
        """Where in the body each message, or its first item, comes from."""

    def add_all(self, items: Iterable[JsonObject], place: str | None = None) -> None:
        """Add items, all of one ``place`` or of the input. Raises RequestError."""
        for i, item in enumerate(items):
            self.add(item, place or f"input[{i}]")

    def add(self, item: JsonObject, place: str) -> None:
        """Add one item. Raises RequestError."""
        kind = item.get("type") or "message"  # null is no error
        if kind == "reasoning":
            self._reasoning += _reasoning_text(item, place)
            return
        if kind == "message":
            self._add_message(item, place)
        elif kind in ("function_call", "custom_tool_call"):
            self._add_call(item, place)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output, call = _text(item.get("output"), f"{place}.output"), item.get("call_id")
            self._append({"role": "tool", "tool_call_id": call, "content": output}, place)
        else:
            raise RequestError(f"{place}: type {shown(kind)} is not supported", param=place)
        last = self.messages[-1]
        if self._reasoning and last["role"] == "assistant":
            last["reasoning_content"] = self._reasoning
        self._reasoning = ""

    def _append(self, message: JsonObject, place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _add_message(self, item: JsonObject, place: str) -> None:
        role = "system" if item.get("role") == "developer" else item.get("role")
        content = _text(item.get("content"), f"{place}.content")
        self._append({"role": role, "content": content}, place)

    def _add_call(self, item: JsonObject, place: str) -> None:
        is_open = self.messages and self.messages[-1]["role"] == "assistant"
        if not is_open or self._reasoning:
            self._append({"role": "assistant", "content": ""}, place)
        name = self._tools.shown_name(item.get("name"), item.get("namespace"))
        arguments = item.get("arguments")
        if item["type"] == "custom_tool_call":
            text = _text(item.get("input"), f"{place}.input")
            arguments = json.dumps({INPUT: text}, ensure_ascii=False)
        function = {"name": name, "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        self.messages[-1].setdefault("tool_calls", []).append(call)


def sealed(reasoning: str) -> str:
    """Return reasoning as ``encrypted_content``, for clients that send nothing else of it back. It
    is encoded only: the item has the same text in the clear."""
    return SEALED + base64.b64encode(reasoning.encode()).decode()


def _unsealed(content: object) -> str:
    """Return the reasoning in ``encrypted_content``; empty if another server has encrypted it."""
    if not isinstance(content, str) or not content.startswith(SEALED):
        return ""
    try:
        return base64.b64decode(content[len(SEALED) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _reasoning_text(item: JsonObject, place: str) -> str:
    """Return the full text of a reasoning item, else its summary."""
    if item.get("content"):
        return _text(item["content"], f"{place}.content")
    if sealed_text := _unsealed(item.get("encrypted_content")):
        return sealed_text
    return _text(item.get("summary") or [], f"{place}.summary")


def _text(content: Any, place: str) -> str:
    """Join a text or a list of text parts. Raises RequestError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be text or a list of parts", param=place)
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind != "refusal" and kind not in TEXT_PARTS:
        raise RequestError(f"{place}: type {shown(kind)} is not supported; text is", param=place)
    if not isinstance(text, str):
        raise RequestError(f"{place} has no text", param=place)
    return text
