"""Content blocks of Anthropic's API, converted to messages of a chat.

A result of a tool becomes a message before the text of its turn. Thinking reaches the chat template
beside the text and the calls that followed it. Knows no request.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from s1engine.errors import RequestError
from s1engine.server.api.response_formatter import Json

THINKING = ("thinking", "redacted_thinking")  # the latter holds no text
ERROR = "Error: "  # before the content of a result that is one


def to_messages(role: str, content: Any, where: str) -> list[Json]:
    """Return one turn as messages of a chat. Raises RequestError naming the block."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise _error(f"{where}.content", "must be a text or a list of blocks")
    blocks = [(block, f"{where}.content[{i}]") for i, block in enumerate(content)]
    for block, place in blocks:
        if not isinstance(block, dict):
            raise _error(place, "must be an object")
    if role == "assistant":
        return [_answer(blocks)]
    results = [_result(block, place) for block, place in blocks if _kind(block) == "tool_result"]
    others = [(block, place) for block, place in blocks if _kind(block) != "tool_result"]
    texts = [{"role": role, "content": _joined(others)}] if others or not results else []
    return [*results, *texts]


def text_of(content: Any, where: str) -> str:
    """Return the text of a string, or of a list of blocks. Raises RequestError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(where, "must be a text or a list of blocks")
    return _joined((block, f"{where}[{i}]") for i, block in enumerate(content))


def _answer(blocks: Sequence[tuple[Json, str]]) -> Json:
    texts = [(b, place) for b, place in blocks if _kind(b) not in (*THINKING, "tool_use")]
    message: Json = {"role": "assistant", "content": _joined(texts)}
    thinking = [_string(b, "thinking", place) for b, place in blocks if _kind(b) == "thinking"]
    if any(thinking):
        message["reasoning_content"] = "".join(thinking)
    calls = [_call(block, place) for block, place in blocks if _kind(block) == "tool_use"]
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Json, where: str) -> Json:
    arguments = block.get("input")
    if arguments is not None and not isinstance(arguments, dict):
        raise _error(f"{where}.input", "must be an object")
    function = {"name": _string(block, "name", where), "arguments": arguments or {}}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _result(block: Json, where: str) -> Json:
    content = block.get("content")
    text = "" if content is None else text_of(content, f"{where}.content")
    if block.get("is_error"):
        text = ERROR + text
    name = _string(block, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": name, "content": text}


def _joined(blocks: Iterable[tuple[Any, str]]) -> str:
    return "".join(_text(block, place) for block, place in blocks)


def _text(block: Any, where: str) -> str:
    """Return the text of a block: plain text, a document of text, or a result of a search."""
    kind = _kind(block)
    if kind == "text":
        return _string(block, "text", where)
    if kind == "tool_reference":
        return _string(block, "tool_name", where)
    source = block.get("source") if isinstance(block, dict) else None
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text":
            return _titled(block, _string(source, "data", f"{where}.source"))
        if source.get("type") == "content":
            return _titled(block, text_of(source.get("content"), f"{where}.source.content"))
    if kind == "search_result":
        return _titled(block, text_of(block.get("content"), f"{where}.content"))
    raise _error(where, f"blocks of type {kind} are not supported: this model reads text")


def _titled(block: Json, text: str) -> str:
    title = block.get("title")
    return f"{title}\n{text}\n" if isinstance(title, str) and title else f"{text}\n"


def _kind(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    return kind[:64] if isinstance(kind, str) else "(none)"


def _string(block: Json, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _error(f"{where}.{name}", "must be text")
    return value


def _error(where: str, problem: str) -> RequestError:
    return RequestError(f"{where} {problem}", param=where)
