"""Calls of tools in the text of an answer, as Qwen and Hermes write them, found while it grows.

    <tool_call>
    {"name": "f", "arguments": {...}}
    </tool_call>

Only answers come here, so what a model thinks of tools stays thought. However the text is cut into
pieces, the calls are the same. What holds of text that is not quite this:

    name and arguments in that order   the name is told as soon as the arguments begin, they as they
                                       come, whether or not they turn out to be JSON; blanks and
                                       closing braces behind them are dropped
    any other JSON with both           a call, told when it is closed
    anything else, or never closed     plain text, tags included
    blanks beside a call               dropped

Knows nothing of HTTP and nothing of which tools there are.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

OPEN, CLOSE = "<tool_call>", "</tool_call>"
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*'  # without its end
HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({STRING}")\s*,\s*"arguments"\s*:\s*(?=\{{)')
HEAD_STEPS = ("{", '"name"', ":", None, ",", '"arguments"', ":")  # None: a string
TAIL = re.compile(r"[\s}]*")
STRUCTURE = re.compile(r'["\\{}\[\]]')
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins."""

    index: int  # of the answer's calls
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The call that began last has more arguments; all of them together are JSON text."""

    index: int
    text: str


Piece = str | CallBegin | CallArguments


@dataclass(slots=True)
class ToolCall:
    """A whole call."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """A whole answer: what is text, and what is calls."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, pieces: Iterable[Piece]) -> None:
        """The answer goes on."""
        for piece in pieces:
            if isinstance(piece, str):
                self.text += piece
            elif isinstance(piece, CallBegin):
                self.calls.append(ToolCall(piece.name))
            else:
                self.calls[piece.index].arguments += piece.text


def parse_tool_calls(text: str) -> Said:
    """The text and the calls of a finished answer."""
    said = Said()
    said.add(ToolCallParser().push(text, last=True))
    return said


class ToolCallParser:
    """Takes an answer piece by piece."""

    def __init__(self) -> None:
        self._held = ""  # not yet decided
        self._blanks = ""  # before a call, or what looks like one
        self._read = self._read_text
        self._calls = 0
        self._after_call = False  # nothing but blanks since a call
        self._depth = 0  # of the arguments
        self._in_string = self._escaped = False

    def push(self, text: str, last: bool = False) -> list[Piece]:
        """What is certain with ``text``; all that is left if it is the ``last``."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            read = self._read
            self._read(pieces, last)
            if self._read == read:  # a state is left as soon as it is done
                return pieces

    # --- states: each takes from the held text what it can, and says who reads on ---

    def _read_text(self, pieces: list[Piece], last: bool) -> None:
        if self._after_call:
            self._held = self._held.lstrip()
        at = self._held.find(OPEN)
        if at >= 0:
            before = self._held[:at].rstrip()
            self._say(pieces, before)
            self._blanks = self._held[len(before) : at]
            self._held = self._held[at:]
            self._read = self._read_head
        elif last:
            self._say(pieces, self._held)
            self._held = ""
        else:
            certain = self._held[: len(self._held) - _begun(self._held, OPEN)].rstrip()
            self._say(pieces, certain)
            self._held = self._held[len(certain) :]

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._after_call = False
            pieces.append(text)

    def _read_head(self, pieces: list[Piece], last: bool) -> None:
        """The held text begins with OPEN."""
        head = HEAD.match(self._held, len(OPEN))
        name = _name(head.group(1)) if head else None
        if head and name is not None:
            self._begin(pieces, name)
            self._held = self._held[head.end() :]
            self._depth, self._in_string, self._escaped = 0, False, False
            self._read = self._read_arguments
        elif head or last or not _may_become_head(self._held[len(OPEN) :]):
            self._read = self._read_body

    def _begin(self, pieces: list[Piece], name: str) -> None:
        pieces.append(CallBegin(self._calls, name))
        self._calls += 1

    def _read_arguments(self, pieces: list[Piece], last: bool) -> None:
        end = self._end_of_arguments()
        if end > 0:
            pieces.append(CallArguments(self._calls - 1, self._held[:end]))
        self._held = self._held[end:]
        if self._depth == 0 and end > 0:
            self._read = self._read_tail

    def _end_of_arguments(self) -> int:
        """How much of the held text belongs to the arguments. Their depth is 0 once they end."""
        at, text = 0, self._held
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = STRUCTURE.search(text, at)
            if found is None:
                return len(text)
            at, char = found.end(), found.group()
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
        """Blanks and braces up to CLOSE; from anything else on it is text."""
        tail = TAIL.match(self._held)
        assert tail is not None
        self._held = self._held[tail.end() :]
        if self._held.startswith(CLOSE):
            self._held = self._held[len(CLOSE) :]
        elif not last and CLOSE.startswith(self._held):
            return
        self._after_call = True
        self._read = self._read_text

    def _read_body(self, pieces: list[Piece], last: bool) -> None:
        """Something else than the usual head: judged when it is closed."""
        at = self._held.find(CLOSE)
        if at < 0:
            if last:
                self._say(pieces, self._blanks + self._held)
                self._held = ""
            return
        call = _any_call(self._held[len(OPEN) : at])
        if call is not None:
            self._begin(pieces, call.name)
            pieces.append(CallArguments(self._calls - 1, call.arguments))
            self._after_call = True
        else:
            self._say(pieces, self._blanks + self._held[: at + len(CLOSE)])
        self._held = self._held[at + len(CLOSE) :]
        self._read = self._read_text


def _begun(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker``."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)


def _may_become_head(text: str) -> bool:
    """Can more text make this one that HEAD matches?"""
    rest = text.lstrip()
    for step in HEAD_STEPS:
        if step is None:
            found = re.match(STRING + '"', rest)
            if found is None:
                unfinished = re.fullmatch(STRING + r"\\?", rest)
                return not rest or (unfinished is not None and len(rest) <= MAX_NAME_CHARS)
            rest = rest[found.end() :].lstrip()
        elif rest.startswith(step):
            rest = rest[len(step) :].lstrip()
        else:
            return step.startswith(rest)
    return not rest


def _name(quoted: str) -> str | None:
    """None for one that is empty, too long or no JSON."""
    try:
        return str(json.loads(quoted)) or None if len(quoted) <= MAX_NAME_CHARS + 1 else None
    except ValueError:
        return None


def _any_call(body: str) -> ToolCall | None:
    """A call from a whole body: JSON with a name, and arguments that are an object or its text."""
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
