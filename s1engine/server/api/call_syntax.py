"""The syntax of tool calls in each format, for the parser of answers.

    hermes        <tool_call>{"name": "f", "arguments": {...}}</tool_call>, or XML of xml_calls
    llama3_json   {"name": "f", "parameters": {...}}; {...}, after <|python_tag|> or as the answer
    mistral       [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...], or [TOOL_CALLS]f[ARGS]{...}
    pythonic      [f(a=1), g(b="x")], between <|python_start|> and <|python_end|> or as the answer

``hermes`` reads ``qwen3_coder`` too. gpt-oss's calls have become Hermes' already
(``engine/answer_text.py``).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from s1engine.server.api.pythonic_calls import parse_pythonic_calls
from s1engine.server.api.xml_calls import Properties, parse_xml_call
from s1engine.tool_prompt import CLOSE, OPEN

MAX_NAME_CHARS = 256
MAX_HEAD_CHARS = 1024  # before the arguments; anything longer is read when it is complete
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*'  # without the closing quote
KEYS = ('"arguments"', '"parameters"')
JSON_HEAD = rf'\{{\s*"name"\s*:\s*({STRING}")\s*,\s*(?:{"|".join(KEYS)})\s*:\s*(?=\{{)'
JSON_STEPS = ("{", '"name"', ":", None, ",", KEYS, ":")  # None: a string
NAMED = r"([\w.:-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)"

Tools = Mapping[str, Properties]
"""The schemas of each tool's parameters."""


@dataclass(slots=True)
class ToolCall:
    """A complete call; ``arguments`` are JSON text."""

    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls stand in a text.

    Attributes:
        openers: texts before a call.
        bare: matches the beginning of an answer that is a call without an opener.
        head: matches from the opener to the arguments, a JSON object that streams; None: calls
            are read when they are complete. Group 1 is a quoted name, else group 2 the name.
        may_be_head: can more text make ``head`` match?
        tail: matches what is dropped after the arguments.
        closer: text after the calls; it may be missing if the calls end by themselves.
        closes: without ``closer`` it is no call yet, and what is no call reaches to it.
        quotes: of strings in calls that end by themselves, with their brackets.
        read: the calls in a complete text; None if it holds none.
    """

    openers: tuple[str, ...]
    bare: re.Pattern[str] | None
    head: re.Pattern[str] | None
    may_be_head: Callable[[str], bool]
    tail: re.Pattern[str]
    closer: str
    closes: bool
    quotes: str
    read: Callable[[str, Tools], list[ToolCall] | None]


def decode_name(quoted: str) -> str | None:
    """A name in JSON; None if it is empty, too long or not JSON."""
    try:
        return str(json.loads(quoted)) or None if len(quoted) <= MAX_NAME_CHARS + 1 else None
    except ValueError:
        return None


def _may_follow(text: str, steps: tuple[str | tuple[str, ...] | None, ...]) -> bool:
    """Can more text complete ``steps``, with blanks between them?"""
    rest = text.lstrip()
    for step in steps:
        if step is None:
            string = re.match(STRING + '"', rest)
            if string is None:
                unfinished = re.fullmatch(STRING + r"\\?", rest)
                return not rest or (unfinished is not None and len(rest) <= MAX_NAME_CHARS)
            rest = rest[string.end() :].lstrip()
            continue
        words = step if isinstance(step, tuple) else (step,)
        word = next(filter(rest.startswith, words), None)
        if word is None:
            return any(word.startswith(rest) for word in words)
        rest = rest[len(word) :].lstrip()
    return not rest


def _may_be_json_head(text: str) -> bool:
    return _may_follow(text, JSON_STEPS)


def _may_be_mistral_head(text: str) -> bool:
    rest = text.lstrip()
    if rest[:1] in ("", "[", "{"):
        return _may_follow(rest.removeprefix("["), JSON_STEPS)
    return (
        re.fullmatch(r"[\w.:-]{1,256}\s*(\[[A-Z_\]\s]*\w*\s*(\[[A-Z\]]*)?\s*)?", rest) is not None
    )


def _json_call(call: Any) -> ToolCall | None:
    """Name, and arguments that are an object or its text; without arguments they are empty."""
    if not isinstance(call, dict):
        return None
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters"))
    text = "{}" if arguments is None else ""
    if isinstance(arguments, str):
        text, arguments = arguments, json.loads(arguments)
    elif arguments is not None:
        text = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return None
    return ToolCall(name, text) if isinstance(arguments, dict | None) else None


def _read_json(body: str, tools: Tools) -> list[ToolCall] | None:
    """One call, or a list of them."""
    try:
        value = json.loads(body)
        found = [_json_call(call) for call in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, RecursionError):
        return None
    calls = [call for call in found if call is not None]
    return calls if calls and len(calls) == len(found) else None


def _read_hermes(body: str, tools: Tools) -> list[ToolCall] | None:
    if (xml := parse_xml_call(body, tools)) is not None:
        return [ToolCall(*xml)] if len(xml[0]) <= MAX_NAME_CHARS else None
    calls = _read_json(body, tools)
    return calls if calls and len(calls) == 1 else None


def _read_pythonic(body: str, tools: Tools) -> list[ToolCall] | None:
    calls = parse_pythonic_calls(body, tools) or []
    return [ToolCall(*call) for call in calls if len(call[0]) <= MAX_NAME_CHARS] or None


SYNTAXES: dict[str, CallSyntax] = {
    "hermes": CallSyntax(
        openers=(OPEN,),
        bare=None,
        head=re.compile(rf"\s*{JSON_HEAD}"),
        may_be_head=_may_be_json_head,
        tail=re.compile(r"[\s}]*"),
        closer=CLOSE,
        closes=True,
        quotes='"',
        read=_read_hermes,
    ),
    "llama3_json": CallSyntax(
        openers=("<|python_tag|>",),
        bare=re.compile(r"\s*\{"),
        head=re.compile(rf"[\s;]*{JSON_HEAD}"),
        may_be_head=_may_be_json_head,
        tail=re.compile(r"[\s};]*"),
        closer="",
        closes=False,
        quotes='"',
        read=_read_json,
    ),
    "mistral": CallSyntax(
        openers=("[TOOL_CALLS]",),
        bare=None,
        head=re.compile(rf"[\s\[,]*(?:{JSON_HEAD}|{NAMED})"),
        may_be_head=_may_be_mistral_head,
        tail=re.compile(r"[\s},\]]*"),
        closer="",
        closes=False,
        quotes='"',
        read=_read_json,
    ),
    "pythonic": CallSyntax(
        openers=("<|python_start|>",),
        bare=re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\("),
        head=None,
        may_be_head=lambda text: False,
        tail=re.compile(r"\s*"),
        closer="<|python_end|>",
        closes=False,
        quotes="\"'",
        read=_read_pythonic,
    ),
}
for _name in ("qwen3_coder", "openai"):
    SYNTAXES[_name] = SYNTAXES["hermes"]
