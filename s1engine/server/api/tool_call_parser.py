"""Incremental parser of tool calls in an answer's text, in any format of ``call_syntax``.

It sees answers only, so tool calls in the thinking stay thinking. The result does not depend on how
the text is cut into pieces:

    name, then arguments               the name is returned when the arguments begin, the arguments
                                       as they come, even if they are not JSON; blanks and closing
                                       braces after them are dropped
    any other call                     returned when it is complete
    anything else, or never complete   plain text, tags included
    blanks beside a call               dropped, and the beginning of a closing tag that is cut

The work is linear in the length of the text. Knows no HTTP.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

from s1engine.server.api.call_syntax import (
    MAX_HEAD_CHARS,
    SYNTAXES,
    ToolCall,
    Tools,
    decode_name,
)
from s1engine.server.api.xml_calls import is_cut

NON_BLANK = re.compile(r"\S")
NO_TOOLS: Tools = MappingProxyType({})


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


class BracketScanner:
    """Finds the end of a text in brackets, piece by piece. Strings in ``quotes`` hold none."""

    def __init__(self, quotes: str) -> None:
        self._structure = re.compile(rf"[{quotes}\\{{}}\[\]()]")
        self._quotes = quotes
        self._depth = 0
        self._string = ""  # its quote
        self._escaped = False

    def find_end(self, text: str, begin: int = 0) -> int:
        """Return the place after the last bracket, or -1. Each call goes on where the one before
        has ended."""
        at = begin
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = self._structure.search(text, at)
            if match is None:
                return -1
            at, char = match.end(), match.group()
            if self._string:
                self._escaped = char == "\\"
                self._string = "" if char == self._string else self._string
            elif char in self._quotes:
                self._string = char
            elif char in "{[(":
                self._depth += 1
            elif char in "}])":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return -1


class ToolCallParser:
    """Parses an answer piece by piece.

    Args:
        once: nothing after the first call counts. Where calls need a closer, it is a stop string,
            so that the answer ends without it.
        tools: the schemas of each tool's parameters.
        fmt: the format, of SYNTAXES.
    """

    def __init__(self, once: bool = False, tools: Tools = NO_TOOLS, fmt: str = "hermes") -> None:
        self._syntax = SYNTAXES[fmt]
        self._once = once
        self._tools = tools
        self._held = ""  # not yet decided
        self._blanks: list[str] = []  # before a possible call
        self._opener = ""  # that the held text begins with
        self._bare_call = False  # a possible call has no opener, so its name must be a tool's
        self._searched = 0  # characters of the held text in which no call ends
        self._first_closer = -1  # place in the held text
        self._scanner = BracketScanner(self._syntax.quotes)
        self._read = self._read_begin if self._syntax.bare else self._read_text
        self._num_calls = 0
        self._after_call = False  # only blanks since the last call

    def push(self, text: str, last: bool = False) -> list[Piece]:
        """Return what ``text`` decides; everything that is left if it is the ``last``."""
        self._held += text
        pieces: list[Piece] = []
        if last and self._once and self._syntax.closes:
            self._parse(pieces, last=False)
            if self._read != self._read_text:
                self._held += self._syntax.closer
        self._parse(pieces, last)
        return pieces

    def _parse(self, pieces: list[Piece], last: bool) -> None:
        while True:
            read = self._read
            self._read(pieces, last)
            if self._read == read:  # a state changes as soon as it is done
                return

    # --- states: each consumes what it can of the held text and sets the next state ---

    def _read_begin(self, pieces: list[Piece], last: bool) -> None:
        """The answer may be a call without an opener."""
        assert self._syntax.bare is not None
        if self._syntax.bare.match(self._held):
            self._bare_call = True
            self._enter_head("")
        elif last or len(self._held) > MAX_HEAD_CHARS or not self._may_be_bare():
            self._read = self._read_text

    def _may_be_bare(self) -> bool:
        """Blanks, or the beginning of a list with a name."""
        return re.fullmatch(r"\s*(\[\s*[\w.]*)?", self._held) is not None

    def _read_text(self, pieces: list[Piece], last: bool) -> None:
        if self._after_call:
            self._held = self._held.lstrip()
        places = [(self._held.find(opener), opener) for opener in self._syntax.openers]
        at, opener = min((place for place in places if place[0] >= 0), default=(-1, ""))
        if at < 0:
            end = len(self._held) if last else len(self._held) - self._undecided()
            self._add_text(pieces, self._held[:end], last)
            self._held = self._held[end:]
            return
        self._add_text(pieces, self._held[:at])
        self._held = self._held[at:]
        self._bare_call = False
        self._enter_head(opener)

    def _undecided(self) -> int:
        """Characters at the end of the held text that may begin an opener."""
        return max(_overlap(self._held, opener) for opener in self._syntax.openers)

    def _add_text(self, pieces: list[Piece], text: str, last: bool = False) -> None:
        """Blanks at its end wait: a call may follow."""
        end = len(text) if last else len(text.rstrip())
        if end or (last and self._blanks and not self._after_call):
            whole = "".join([*self._blanks, text[:end]])
            self._blanks, self._after_call = [], False
            if whole:
                pieces.append(whole)
        if text[end:]:
            self._blanks.append(text[end:])

    def _enter_head(self, opener: str) -> None:
        """The held text begins with ``opener``."""
        self._opener, self._searched, self._first_closer = opener, 0, -1
        self._read = self._read_head

    def _read_head(self, pieces: list[Piece], last: bool) -> None:
        syntax, begin = self._syntax, len(self._opener)
        if syntax.head is None:
            self._read = self._read_body
            self._scanner = BracketScanner(syntax.quotes)
            return
        head = syntax.head.match(self._held, begin)
        name = None
        if head and head.end() - begin <= MAX_HEAD_CHARS:
            name = decode_name(head.group(1)) if head.group(1) else head.group(2)
        if name is not None and (not self._bare_call or name in self._tools):
            self._begin_call(pieces, name)
            self._held = self._held[head.end() :] if head else ""
            self._read = self._read_arguments
            self._scanner = BracketScanner('"')
        elif (
            head or last or len(self._held) - begin > MAX_HEAD_CHARS
            or not syntax.may_be_head(self._held[begin:])
        ):  # fmt: skip
            self._read = self._read_body
            self._scanner = BracketScanner(syntax.quotes)

    def _begin_call(self, pieces: list[Piece], name: str) -> None:
        self._blanks = []
        pieces.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def _read_arguments(self, pieces: list[Piece], last: bool) -> None:
        end = self._scanner.find_end(self._held)
        used = self._held if end < 0 else self._held[:end]
        if used:
            pieces.append(CallArguments(self._num_calls - 1, used))
        self._held = self._held[len(used) :]
        if end >= 0:
            self._end_call()

    def _end_call(self) -> None:
        self._after_call = True
        self._read = self._read_nothing if self._once else self._read_tail

    def _read_nothing(self, pieces: list[Piece], last: bool) -> None:
        """Drop all that follows the only call."""
        self._held = ""

    def _read_tail(self, pieces: list[Piece], last: bool) -> None:
        """Drop blanks and braces up to the closer; another call or text follows."""
        tail, closer = self._syntax.tail.match(self._held), self._syntax.closer
        assert tail is not None
        self._held = self._held[tail.end() :]
        if closer and self._held.startswith(closer):
            self._held = self._held[len(closer) :]
        elif closer.startswith(self._held):
            if not last:
                return
            self._held = ""  # cut by max_tokens
        elif not self._syntax.closes and self._held.startswith("{"):
            self._enter_head("")
            return
        self._read = self._read_text

    def _read_body(self, pieces: list[Piece], last: bool) -> None:
        """Hold anything but the usual head until it is complete."""
        syntax, begin = self._syntax, len(self._opener)
        if syntax.closes:
            end = self._end_of_body(begin, last)
            after = end + len(syntax.closer)
        else:
            end = after = self._end_of_brackets(begin)
        if end < 0 and not last:
            return
        body = self._held[begin:end] if end >= 0 else ""
        calls = syntax.read(body, self._tools) or []
        if self._bare_call and any(call.name not in self._tools for call in calls):
            calls = []
        for call in calls[:1] if self._once else calls:
            self._begin_call(pieces, call.name)
            pieces.append(CallArguments(self._num_calls - 1, call.arguments))
        if calls:
            self._held = self._held[after:]
            self._end_call()
            if syntax.closes and not self._once:
                self._read = self._read_text  # the closer has come
            return
        self._give_up(pieces, after if end >= 0 else len(self._held), last)

    def _end_of_body(self, begin: int, last: bool) -> int:
        """Return where the closer is, -1 if it has not come. One inside of a value in XML does not
        count, unless the call is never closed."""
        opener, closer = self._syntax.openers[0], self._syntax.closer
        while (at := self._held.find(closer, self._searched)) >= 0:
            if self._first_closer < 0:
                self._first_closer = at
            elif self._held.find(opener, self._first_closer, at) >= 0:
                return self._first_closer
            if not is_cut(self._held[begin:at]):
                return at
            self._searched = at + len(closer)
        if self._first_closer >= 0 and (last or opener in self._held[self._first_closer :]):
            return self._first_closer
        self._searched = max(len(self._held) - len(closer), self._searched)
        return -1

    def _end_of_brackets(self, begin: int) -> int:
        """Return where the brackets that the held text begins with end, -1 if it is not known yet;
        ``begin`` if there are none."""
        first = NON_BLANK.search(self._held, begin)
        if first is not None and first.group() not in "{[":
            return begin
        at = max(self._searched, begin)
        self._searched = len(self._held)
        return self._scanner.find_end(self._held, at)

    def _give_up(self, pieces: list[Piece], end: int, last: bool) -> None:
        """The held text up to ``end`` is no call. An opener that stands for nothing is dropped
        where it may be a special token."""
        begin = 0 if self._syntax.closes else len(self._opener)
        text, self._held = self._held[begin:end], self._held[end:]
        self._add_text(pieces, text, last=last and not self._held)
        self._read = self._read_text


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``marker``."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
