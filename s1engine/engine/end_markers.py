"""End markers that the model writes in several tokens: their matcher, and the text around them.

The scheduler finds a marker and marks its tokens as delimiter (csrc/core/budget.hpp). Its first
token may begin with thinking, and its last token may end with the beginning of the answer.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s1engine import _core
from s1engine.errors import ModelError
from s1engine.reasoning import ReasoningFormat
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer


def make_token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The UTF-8 bytes of a token inside a text, its leading space included; of a special token its
    name."""
    if tokenizer.is_byte_level:
        return tokenizer.token_bytes
    anchor = tokenizer.encode("a")  # decoders strip the space at the beginning of a text
    before = len(tokenizer.decode(anchor))

    def token_bytes(token_id: int) -> bytes:
        if tokenizer.is_special(token_id):
            return tokenizer.token_bytes(token_id)
        byte = tokenizer.fallback_byte(token_id)
        return byte or tokenizer.decode([*anchor, token_id])[before:].encode()

    return token_bytes


@dataclass(frozen=True, slots=True)
class WrittenMarker:
    """A marker that the model wrote, in tokens ``first`` to ``last``."""

    first: int
    last: int
    before: bytes  # in the first token, before the marker
    head: bytes  # the rest of the first token
    after: bytes  # in the last token, after the marker

    def text_before(self, decoder: IncrementalDetokenizer) -> str:
        """The last text of the thinking, whose ``decoder`` ends with it."""
        if not self.before:
            return decoder.flush()
        text = decoder.push([self.first])
        decoder.flush()  # part of the marker
        return text[: len(text) - len(_complete_text(self.head))]

    def text_after(self, decoder: IncrementalDetokenizer) -> str:
        """The first text of the answer, whose ``decoder`` begins with it."""
        if not self.after:
            return ""
        text = decoder.push([self.last])
        return text[len(text) - len(_complete_text(self.after)) :]


def _complete_text(data: bytes) -> str:
    """``data`` without a character that is unfinished at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


class MarkerSplitter:
    """Finds the marker in the delimiter tokens of a record.

    Args:
        markers: texts that end the thinking (``ReasoningFormat.end_markers``).
    """

    def __init__(self, markers: Sequence[str], tokenizer: Tokenizer) -> None:
        self._markers = [marker.encode() for marker in markers]
        self._token_bytes = make_token_bytes(tokenizer)

    def find(self, token_ids: Sequence[int], marks: bytes) -> tuple[WrittenMarker, int] | None:
        """The marker among the tokens of a record, and the index of its last token. None if the
        model wrote none: a delimiter that the engine appended has the mark of a forced token."""
        run = [i for i, mark in enumerate(marks) if mark == _core.MARK_DELIMITER]
        if not run:
            return None
        pieces = [self._token_bytes(token_ids[i]) for i in run]
        text = b"".join(pieces)
        begin, end = self._locate(text, len(text) - len(pieces[-1]))
        return WrittenMarker(
            first=token_ids[run[0]],
            last=token_ids[run[-1]],
            before=text[:begin],
            head=pieces[0][begin:],
            after=text[end:],
        ), run[-1]

    def _locate(self, text: bytes, last_token: int) -> tuple[int, int]:
        """Begin and end of the first marker that ends inside the last token; the longest of these.
        ``last_token``: where the last token begins."""
        ends = [
            (at + len(marker), at)
            for marker in self._markers
            for at in range(len(text))
            if text.startswith(marker, at) and at + len(marker) > last_token
        ]
        assert ends, "the scheduler and the output disagree about a marker"
        end, begin = min(ends)
        return begin, end


def make_core_format(
    fmt: ReasoningFormat, tokenizer: Tokenizer, vocab_limit: int, tools: bool = False
) -> _core.BudgetFormat:
    """A reasoning format as the scheduler needs it; ``tools``: for answers that may call tools.
    Raises ModelError for end markers that it cannot follow. The table of a format with end markers
    takes a second for a large vocabulary."""
    token_bytes: list[bytes] = []
    after_marker: list[int] = []
    natural_end = fmt.tools_end if tools else fmt.natural_end
    if fmt.end_markers:
        token_bytes = [*map(make_token_bytes(tokenizer), range(vocab_limit))]
        end = tokenizer.decode(natural_end, skip_special_tokens=False)
        rests = [end[len(text) :] for text in fmt.end_markers if end.startswith(text)]
        after_marker = tokenizer.encode(min(rests, key=len)) if rests else []
    try:
        return _core.BudgetFormat(
            triggers=list(fmt.triggers),
            natural_end=list(natural_end),
            newline=list(fmt.newline),
            newline_always=fmt.newline_always,
            ends_in_newline=tokenizer.newlines,
            end_markers=[marker.encode() for marker in fmt.end_markers],
            token_bytes=token_bytes,
            after_marker=after_marker,
        )
    except ValueError as error:
        raise ModelError(f"reasoning format {fmt.name}: {error}") from error
