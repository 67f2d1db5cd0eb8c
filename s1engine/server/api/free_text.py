"""Incremental parser of the arguments of a custom tool, whose only one is a free text.

    {"input": "the text"}

Arguments of any other form are the text themselves. The result does not depend on how the arguments
are cut into pieces. Invalid escapes lose their backslash; a surrogate without its pair becomes
U+FFFD.
"""

import json
import re

INPUT = "input"
HEAD = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
HEAD_STEPS = ("{", f'"{INPUT}"', ":", '"')
_HIGH, _LOW, _HEX = r"[dD][89abAB][0-9a-fA-F]{2}", r"[dD][c-fC-F][0-9a-fA-F]{2}", "[0-9a-fA-F]"
_CUT = rf"\\(?:u{_HEX}{{0,3}})?"
PLAIN = re.compile(r'[^"\\]+')
ESCAPE = re.compile(rf"\\u{_HIGH}\\u{_LOW}|\\u{_HEX}{{4}}|\\.", re.DOTALL)
CUT_ESCAPE = re.compile(rf"{_CUT}|\\u{_HIGH}(?:{_CUT})?")


class FreeTextParser:
    """Parses arguments piece by piece."""

    def __init__(self) -> None:
        self._held = ""  # not yet decided
        self._read = self._read_head

    def push(self, arguments: str, last: bool = False) -> str:
        """Return the text that ``arguments`` decides; the rest of it if they are the ``last``."""
        self._held += arguments
        texts: list[str] = []
        while True:
            read = self._read
            self._read(texts, last)
            if self._read == read:
                return "".join(texts)

    def _read_head(self, texts: list[str], last: bool) -> None:
        head = HEAD.match(self._held)
        if head is not None:
            self._held = self._held[head.end() :]
            self._read = self._read_string
        elif last or not _may_become_head(self._held):
            self._read = self._read_verbatim

    def _read_verbatim(self, texts: list[str], last: bool) -> None:
        texts.append(self._held)
        self._held = ""

    def _read_string(self, texts: list[str], last: bool) -> None:
        at, held = 0, self._held
        while at < len(held):
            if held[at] == '"':
                self._read = self._read_end
                break
            match = PLAIN.match(held, at)
            if match is None:
                if not last and CUT_ESCAPE.fullmatch(held, at):
                    break
                match = ESCAPE.match(held, at)
                if match is None:  # a backslash ends the arguments
                    at = len(held)
                    break
            texts.append(_decoded(match.group()))
            at = match.end()
        self._held = held[at:]

    def _read_end(self, texts: list[str], last: bool) -> None:
        self._held = ""


def _decoded(text: str) -> str:
    if not text.startswith("\\"):
        return text
    try:
        character = str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text[1:]
    return "\ufffd" if "\ud800" <= character <= "\udfff" else character


def _may_become_head(text: str) -> bool:
    """Can more text make HEAD match?"""
    rest = text.lstrip()
    for step in HEAD_STEPS:
        if not rest.startswith(step):
            return step.startswith(rest)
        rest = rest[len(step) :].lstrip()
    return False
