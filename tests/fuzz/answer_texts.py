"""Target ``answers``: what a model wrote, through everything that reads it piece by piece.

The first byte is the size of the pieces, of text or of tokens. Text, thinking and calls do not
depend on it, arguments of a call that is closed are what the model wrote, a stop string ends the
text before its first occurrence, and markers do not appear.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from s1engine.engine.answer_text import AnswerText, MarkerFilter
from s1engine.engine.sequence_output import StopStringFinder
from s1engine.reasoning import AnswerMarkers, encode_format
from s1engine.reasoning_specs import FORMAT_SPECS
from s1engine.server.api.tool_call_parser import ParsedAnswer, ToolCallParser, parse_answer
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer
from s1engine.tool_prompt import CLOSE, OPEN
from tests.fuzz.target import Target
from tests.tiny_tokenizer import CHATML, make_tokenizer

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
STOPS = ("ab", "aab", "</", "é")

Items = TypeVar("Items", str, bytes, tuple[int, ...])


def _pieces(items: Items, size: int) -> list[Items]:
    return [items[at : at + size] for at in range(0, len(items), size)] if size else [items]


@functools.cache
def _tokenizer() -> Tokenizer:
    return make_tokenizer((*CHATML, *HARMONY))


@functools.cache
def _channels() -> AnswerMarkers:
    return encode_format(FORMAT_SPECS["gpt-oss"], _tokenizer(), ()).answer_markers(True)


def _parse_calls(pieces: Sequence[str]) -> ParsedAnswer:
    parser, answer = ToolCallParser(), ParsedAnswer()
    for piece in pieces:
        answer.add(parser.push(piece))
    answer.add(parser.push("", last=True))
    return answer


def _find_stop(pieces: Sequence[str]) -> str:
    finder = StopStringFinder(STOPS)
    return "".join(map(finder.push, pieces)) + finder.push("", last=True)


def _filter(pieces: Sequence[str]) -> str:
    markers = MarkerFilter((OPEN, CLOSE, *STOPS))
    return "".join(map(markers.push, pieces)) + markers.push("", last=True)


def _decode(pieces: Sequence[tuple[int, ...]]) -> str:
    decoder = IncrementalDetokenizer(_tokenizer())
    return "".join(map(decoder.push, pieces)) + decoder.flush()


def _read_channels(pieces: Sequence[tuple[int, ...]]) -> tuple[str, str]:
    text = AnswerText(_tokenizer(), _channels())
    parts = [*map(text.push, pieces), text.flush(True)]
    return "".join(answer for answer, _ in parts), "".join(thinking for _, thinking in parts)


def _check(read: Callable[[list[Items]], object], items: Items, size: int) -> None:
    assert read(_pieces(items, size)) == read([items]), read.__name__


def run(data: bytes) -> None:
    size = data[0] if data else 0
    text = data[1:].decode(errors="ignore")
    for read in (_parse_calls, _find_stop, _filter):
        _check(read, text, size)
    first = min((text.find(stop) for stop in STOPS if stop in text), default=len(text))
    assert _find_stop([text]) == text[:first]
    if OPEN not in text:
        assert parse_answer(ToolCallParser(), text) == ParsedAnswer(text)
    ids = tuple(_tokenizer().encode(text))
    _check(_decode, ids, size)
    _check(_read_channels, ids, size)
    raw = tuple(byte for byte in data[1:] if byte < _tokenizer().num_tokens)
    _check(_decode, raw, size)
    _check(_read_channels, raw, size)
    _parse_calls([_read_channels([ids])[0]])


WORDS = [word.encode() for word in (OPEN, CLOSE, *STOPS, *HARMONY, *CHATML)]
WORDS += [
    b'{"name": "f", "arguments": ',
    b'"arguments"',
    b'"name"',
    b"}\n",
    b'\\"',
    b"to=functions.f",
]
TARGETS = {"answers": Target(run, WORDS)}
