"""Incremental parser of tool calls in an answer's text, in the formats of Qwen and Hermes.

    <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>

It sees answers only, so tool calls in the thinking stay thinking. The result does not depend on how
the text is cut into pieces:

    name, then arguments               the name is returned when the arguments begin, the arguments
                                       as they come, even if they are not JSON; blanks and closing
                                       braces after them are dropped
    any other JSON with both           a call, returned when it is closed
    a call in the XML of xml_calls     a call, returned when it is closed
    anything else, or never closed     plain text, tags included
    blanks beside a call               dropped, and the beginning of a closing tag that is cut

Knows neither HTTP nor which tools exist.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from s1engine.server.api.xml_calls import Properties, parse_xml_call
from s1engine.tool_prompt import CLOSE, OPEN

STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*'  # without the closing quote
HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({STRING}")\s*,\s*"arguments"\s*:\s*(?=\{{)')
HEAD_STEPS = ("{", '"name"', ":", None, ",", '"arguments"', ":")  # None: a string
TAIL = re.compile(r"[\s}]*")
STRUCTURE = re.compile(r'["\\{}\[\]]')
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins."""

    index: int  # of the answer's calls
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More arguments of the current call; all of them joined are JSON text."""

    index: int
    text: str


Piece = str | CallBegin | CallArguments


@dataclass(slots=True)
class ToolCall:
    """A complete call."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """The text and the calls of an answer."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Append pieces."""
        for piece in pieces:
            if isinstance(piece, str):
                self.text += piece
            elif isinstance(piece, CallBegin):
                self.calls.append(ToolCall(piece.name))
            else:
                self.calls[piece.index].arguments += piece.text


def parse_answer(parser: "ToolCallParser | None", text: str) -> ParsedAnswer:
    """Parse a finished answer; without a parser all of it is text."""
    if parser is None:
        return ParsedAnswer(text)
    answer = ParsedAnswer()
    answer.add(parser.push(text, last=True))
    return answer


class ToolCallParser:
    """Parses an answer piece by piece.

    Args:
        once: CLOSE is a stop string, so that an answer ends with its first call, without CLOSE.
        tools: the schemas of each tool's parameters.
    """

    def __init__(
        self, once: bool = False, tools: Mapping[str, Properties] = MappingProxyType({})
    ) -> None:
        self._once = once
        self._tools = tools
        self._held = ""  # not yet decided
        self._blanks = ""  # before a possible call
        self._searched = 0  # characters of the held text in which no call ends
        self._read = self._read_text
        self._num_calls = 0
        self._after_call = False  # only blanks since the last call
        self._depth = 0  # of the arguments
        self._in_string = self._escaped = False

    def push(self, text: str, last: bool = False) -> list[Piece]:
        """Return what ``text`` decides; everything that is left if it is the ``last``."""
        self._held += text
        pieces: list[Piece] = []
        if last and self._once:
            self._parse(pieces, last=False)
            if self._read != self._read_text:
                self._held += CLOSE
        self._parse(pieces, last)
        return pieces

    def _parse(self, pieces: list[Piece], last: bool) -> None:
        while True:
            read = self._read
            self._read(pieces, last)
            if self._read == read:  # a state changes as soon as it is done
                return

    # --- states: each consumes what it can of the held text and sets the next state ---

    def _read_text(self, pieces: list[Piece], last: bool) -> None:
        if self._after_call:
            self._held = self._held.lstrip()
        at = self._held.find(OPEN)
        if at >= 0:
            before = self._held[:at].rstrip()
            self._add_text(pieces, before)
            self._blanks = self._held[len(before) : at]
            self._held = self._held[at:]
            self._read = self._read_head
        elif last:
            self._add_text(pieces, self._held)
            self._held = ""
        else:
            certain = self._held[: len(self._held) - _overlap(self._held, OPEN)].rstrip()
            self._add_text(pieces, certain)
            self._held = self._held[len(certain) :]

    def _add_text(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._after_call = False
            pieces.append(text)

    def _read_head(self, pieces: list[Piece], last: bool) -> None:
        """The held text begins with OPEN."""
        head = HEAD.match(self._held, len(OPEN))
        name = _name(head.group(1)) if head else None
        if head and name is not None:
            self._begin_call(pieces, name)
            self._held = self._held[head.end() :]
            self._depth, self._in_string, self._escaped = 0, False, False
            self._read = self._read_arguments
        elif head or last or not _may_become_head(self._held[len(OPEN) :]):
            self._read = self._read_body

    def _begin_call(self, pieces: list[Piece], name: str) -> None:
        pieces.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def _read_arguments(self, pieces: list[Piece], last: bool) -> None:
        end = self._end_of_arguments()
        if end > 0:
            pieces.append(CallArguments(self._num_calls - 1, self._held[:end]))
        self._held = self._held[end:]
        if self._depth == 0 and end > 0:
            self._read = self._read_tail

    def _end_of_arguments(self) -> int:
        """Return how much of the held text is arguments. The depth is 0 at their end."""
        at, text = 0, self._held
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = STRUCTURE.search(text, at)
            if match is None:
                return len(text)
            at, char = match.end(), match.group()
            if self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at
        return at

    def _read_tail(self, pieces: list[Piece], last: bool) -> None:
        """Drop blanks and braces up to CLOSE; anything else begins text."""
        tail = TAIL.match(self._held)
        assert tail is not None
        self._held = self._held[tail.end() :]
        if self._held.startswith(CLOSE):
            self._held = self._held[len(CLOSE) :]
        elif CLOSE.startswith(self._held):
            if not last:
                return
            self._held = ""  # cut by max_tokens
        self._after_call = True
        self._read = self._read_text

    def _read_body(self, pieces: list[Piece], last: bool) -> None:
        """Hold anything but the usual head until it is closed."""
        at = self._held.find(CLOSE, self._searched)
        if at < 0:
            self._searched = max(len(self._held) - len(CLOSE), 0)
            if last:
                self._add_text(pieces, self._blanks + self._held)
                self._held = ""
            return
        self._searched = 0
        call = _any_call(self._held[len(OPEN) : at], self._tools)
        if call is not None:
            self._begin_call(pieces, call.name)
            pieces.append(CallArguments(self._num_calls - 1, call.arguments))
            self._after_call = True
        else:
            self._add_text(pieces, self._blanks + self._held[: at + len(CLOSE)])
        self._held = self._held[at + len(CLOSE) :]
        self._read = self._read_text


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``marker``."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)


def _may_become_head(text: str) -> bool:
    """Can more text make HEAD match?"""
    rest = text.lstrip()
    for step in HEAD_STEPS:
        if step is None:
            string = re.match(STRING + '"', rest)
            if string is None:
                unfinished = re.fullmatch(STRING + r"\\?", rest)
                return not rest or (unfinished is not None and len(rest) <= MAX_NAME_CHARS)
            rest = rest[string.end() :].lstrip()
        elif rest.startswith(step):
            rest = rest[len(step) :].lstrip()
        else:
            return step.startswith(rest)
    return not rest


def _name(quoted: str) -> str | None:
    """Decode a name; None if it is empty, too long or not JSON."""
    try:
        return str(json.loads(quoted)) or None if len(quoted) <= MAX_NAME_CHARS + 1 else None
    except ValueError:
        return None


def _any_call(body: str, tools: Mapping[str, Properties]) -> ToolCall | None:
    """Parse a complete call: JSON with a name, and arguments that are an object or its text; or
    XML."""
    if (xml := parse_xml_call(body, tools)) is not None:
        return ToolCall(*xml) if len(xml[0]) <= MAX_NAME_CHARS else None
    try:
        call = json.loads(body)
        name, arguments = call["name"], call["arguments"]
        if isinstance(arguments, str):
            text, arguments = arguments, json.loads(arguments)
        else:
            text = json.dumps(arguments, ensure_ascii=False)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    usable = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS
    return ToolCall(name, text) if usable and isinstance(arguments, dict) else None
