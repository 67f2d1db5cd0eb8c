"""The text of an answer, without the markers of the model's reasoning format.

After the thinking has ended, a model may repeat an end marker, most of all where a small budget cut
it off, or think again. Markers are not shown: those of tokens of their own are known by their ids,
those that are spelt out by their text. What may become a marker is held back. Token ids and
log-probabilities keep them. Knows nothing of stop strings, which apply to the text that is shown.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

from s1engine.reasoning import AnswerMarkers, Channels
from s1engine.tokenizer import IncrementalDetokenizer, Tokenizer

Items = TypeVar("Items", str, tuple[int, ...])
CALL_BEGIN = '<tool_call>\n{"name": "%s", "arguments": '
CALL_END = "}\n</tool_call>"  # with CALL_BEGIN the format that the server parses


class MarkerFilter(Generic[Items]):
    """Removes markers from growing text, or from growing ids: the first, of these the longest."""

    def __init__(self, markers: Sequence[Items]) -> None:
        self._markers: list[Items] = sorted(set(markers), key=len, reverse=True)
        self._firsts: set[object] = {marker[0] for marker in markers}
        self._held: Items | None = None

    def push(self, items: Items, last: bool = False) -> Items:
        """Returns what is certain to be no part of a marker; all that is left if it is the
        ``last``."""
        kept = items[:0]
        for piece, _ in self.split(items, last):
            kept += piece
        return kept

    def split(self, items: Items, last: bool = False) -> list[tuple[Items, Items | None]]:
        """The same, in one piece or more, each with the marker after it; None after the last."""
        if self._held is not None:
            items, self._held = self._held + items, None
        elif self._firsts.isdisjoint(items):
            return [(items, None)]
        pieces: list[tuple[Items, Items | None]] = []
        begin = at = 0  # items[begin:at] are to be kept as well
        while at < len(items):
            if items[at] not in self._firsts:
                at += 1
                continue
            if not last and self._may_grow(items[at:]):
                self._held = items[at:]
                break
            size = next((len(m) for m in self._markers if items[at : at + len(m)] == m), 0)
            if size:
                pieces.append((items[begin:at], items[at : at + size]))
                begin = at = at + size
            else:
                at += 1
        pieces.append((items[begin:at], None))
        return pieces

    def _may_grow(self, rest: Items) -> bool:
        """Is all of ``rest`` the beginning of a marker that is longer?"""
        return any(len(m) > len(rest) and m[: len(rest)] == rest for m in self._markers)


class AnswerText:
    """Text of growing answer tokens. What the model writes between a start and an end of thinking
    is thinking, even if it was asked not to think.

    Args:
        markers: those to be removed; None: none, the text is that of all tokens.

    Attributes:
        thinking: the answer is within such a block.
        num_thinking: tokens of such blocks so far.
        completed: the last id that was pushed completes a marker of ids.
    """

    def __init__(self, tokenizer: Tokenizer, markers: AnswerMarkers | None) -> None:
        self.decoder = IncrementalDetokenizer(tokenizer, markers.shown if markers else ())
        self._ids = MarkerFilter(markers.ids) if markers and markers.ids else None
        self._texts = MarkerFilter(markers.texts) if markers and markers.texts else None
        channels = markers.channels if markers else None
        self._channels = None if channels is None else _ChannelText(tokenizer, channels)
        self.completed = False  # the last ids ended in a marker
        self._openers = (markers.opener, markers.opener_ids) if markers else ()
        self.thinking = False
        self._has_text = False  # more than blanks, outside of thinking
        self.num_thinking = 0

    def push(self, ids: Sequence[int]) -> tuple[str, str]:
        """The text that ``ids`` complete: of the answer, and of thinking within it."""
        if self._channels is not None:
            return self._channels.push(ids)
        self.completed = False
        if self._ids is None:
            self.num_thinking += len(ids) if self.thinking else 0
            return self.push_text(self.decoder.push(ids))
        return self._push_ids(tuple(ids))

    def _push_ids(self, ids: tuple[int, ...], last: bool = False) -> tuple[str, str]:
        assert self._ids is not None
        answer = reasoning = ""
        for kept, marker in self._ids.split(ids, last):
            self.num_thinking += len(kept) if self.thinking else 0
            text = self.decoder.push(kept)
            if marker is not None or last:
                text += self.decoder.flush()
            more = self.push_text(text, last=marker is not None or last)
            answer, reasoning = answer + more[0], reasoning + more[1]
            if marker is not None:
                self.thinking, self.completed = marker in self._openers, True
            elif kept:
                self.completed = False
        return answer, reasoning

    def push_text(self, text: str, last: bool = False) -> tuple[str, str]:
        """The same for text of the answer."""
        parts = ["", ""]
        pieces = [(text, None)] if self._texts is None else self._texts.split(text, last)
        for kept, marker in pieces:
            parts[self.thinking] += kept
            self._has_text |= bool(parts[0].strip())
            if marker in self._openers and self._has_text:
                parts[self.thinking] += marker or ""
            elif marker is not None:
                self.thinking = marker in self._openers
        return parts[0], parts[1]

    def flush(self, complete: bool) -> tuple[str, str]:
        """The rest; ``complete``: the model ended its answer itself."""
        if self._channels is not None:
            return self._channels.flush(complete)
        if self._ids is not None:
            return self._push_ids((), last=True)
        return self.push_text(self.decoder.flush(), last=True)


class _ChannelText:
    """Text of an answer that consists of messages with headers (``ChannelSyntax``).

    Headers are not shown. A call becomes text in the one format that the server parses."""

    def __init__(self, tokenizer: Tokenizer, channels: Channels) -> None:
        self._tokenizer = tokenizer
        self._channels = channels
        self._decoder = IncrementalDetokenizer(tokenizer)
        self._header: list[int] | None = [] if channels.begins_in_header else None
        self._thinking = self._calling = False  # the current message
        self._has_text = self._had_text = False  # this message; those before it

    def push(self, ids: Sequence[int]) -> tuple[str, str]:
        answer = reasoning = ""
        body: list[int] = []
        for token in (*ids, None):  # None: the end of these ids
            marker = token is None or token in self._channels.markers
            if not marker and self._header is None:
                assert token is not None
                body.append(token)
                continue
            text = self._decoder.push(body) if body else ""
            body = []
            if token is not None and self._header is None:
                text += self._decoder.flush()
            if self._thinking:
                reasoning += text
            else:
                answer += self._separated(text)
            if token is None:
                break
            if marker:
                answer += self._on_marker(token)
            elif self._header is not None:
                self._header.append(token)
        return answer, reasoning

    def _separated(self, text: str) -> str:
        """``text``, after a blank line if it begins a further message."""
        first = bool(text) and not self._has_text and self._had_text and not self._calling
        self._has_text |= bool(text)
        return "\n\n" + text if first else text

    def _on_marker(self, token: int) -> str:
        """Handles the begin or the end of a header, and the end of a message. Returns text."""
        channels, text = self._channels, ""
        if token == channels.header_end:
            text = self._begin_message()
        elif token in channels.header_starts:
            text = self._end_message() if self._header is None else ""
            self._header = [*(self._header or ()), token]
        else:
            text = self._end_message()
            self._header = None
        return text

    def _begin_message(self) -> str:
        spec = self._channels.syntax
        header = self._tokenizer.decode(self._header or [], skip_special_tokens=False)
        self._header = None
        _, _, channel = header.rpartition(spec.header_starts[-1])
        self._thinking = channel.split()[:1] == [spec.thinking]
        recipient = header.partition(spec.recipient)[2]
        for start in spec.header_starts:
            recipient = recipient.partition(start)[0]
        name = recipient.split()[0].partition("<")[0] if recipient.split() else ""
        self._calling = bool(name)
        if not self._calling:
            return ""
        self._has_text = True
        lead = "\n" if self._had_text else ""
        return lead + CALL_BEGIN % name.replace("\\", "\\\\").replace('"', '\\"')

    def _end_message(self) -> str:
        text = CALL_END if self._calling else ""
        self._had_text |= self._has_text
        self._thinking = self._calling = self._has_text = False
        return text

    def flush(self, complete: bool) -> tuple[str, str]:
        text = self._decoder.flush()
        if self._thinking:
            return "", text
        return text + (self._end_message() if complete else ""), ""
