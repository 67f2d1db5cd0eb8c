"""A reasoning format in the token ids of one model.

The texts of a format (``reasoning_specs``) are encoded once, and passed to the scheduler, which
knows nothing of text. Which format a model has, and whether a chat thinks, is decided in
``thinking_rule``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from s1engine.errors import RequestError
from s1engine.reasoning_specs import PARAM, ChannelSyntax, ReasoningFormatSpec
from s1engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Channels:
    """A ChannelSyntax in token ids."""

    syntax: ChannelSyntax
    header_starts: tuple[int, ...]
    header_end: int
    markers: tuple[int, ...]
    """All ids that begin or end a header or a message."""
    begins_in_header: bool
    """The answer begins within a header."""


@dataclass(frozen=True, slots=True)
class AnswerMarkers:
    """What is not shown in an answer, and what is. Plain data that can cross processes."""

    ids: tuple[tuple[int, ...], ...] = ()
    """Markers that begin with a token of their own."""
    texts: tuple[str, ...] = ()
    """Markers that are spelt out."""
    channels: Channels | None = None
    opener: str = ""
    """The marker among ``texts`` after which the model thinks, until the next one; only at the
    beginning of an answer, which may mention it later."""
    opener_ids: tuple[int, ...] = ()
    """The same among ``ids``."""
    shown: tuple[int, ...] = ()
    """Special tokens that are shown, because they belong to tool calls."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A format in the token ids of one model."""

    spec: ReasoningFormatSpec
    start: tuple[int, ...]
    """Appended to a prompt to open the thinking."""
    open_marker: tuple[int, ...]
    """Prefix of ``start`` that identifies open thinking, if it is a marker of single tokens."""
    triggers: tuple[int, ...]
    """Ids by which the model ends its thinking."""
    end_markers: tuple[str, ...]
    """Texts that end the thinking as well and are no single token."""
    natural_end: tuple[int, ...]
    """Replaces a trigger."""
    tools_end: tuple[int, ...]
    """Replaces a trigger where tools are offered."""
    newline: tuple[int, ...]
    """Precedes a forced end."""
    newline_always: bool
    """False: only if the thinking does not end in a newline."""
    single_tokens: bool
    """Delimiters begin with tokens of their own, so that ids decide whether thinking is open."""
    _tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """The format's name."""
        return self.spec.name

    def forced_end(self, final_text: str | None = None, tools: bool = False) -> tuple[int, ...]:
        """Delimiter and final text (None: the format's own), encoded as one string, without the
        newline before them. ``tools``: the model may call tools."""
        if tools and self.spec.tools_end:
            return self.tools_end
        final = self.spec.final_text if final_text is None else final_text
        ids = self._encode(self.spec.closing_text(final))
        if self._delimiter_len(ids) is not None:
            return ids
        return self._encode(self.spec.closing_text("")) + self._encode(final)

    def delimiter_len(self, forced_end: Sequence[int]) -> int:
        """Number of leading tokens of a forced end that are the delimiter; the rest begins the
        answer. Blanks after a delimiter may share its last token."""
        n = self._delimiter_len(forced_end)
        return len(forced_end) if n is None else n

    def _delimiter_len(self, forced_end: Sequence[int]) -> int | None:
        """The same; None if a token joins the delimiter with more than blanks."""
        for end in (self.natural_end, self.tools_end):
            if tuple(forced_end[: len(end)]) == end:
                return len(end)
        for n in range(1, len(forced_end)):
            text = self._tokenizer.decode(forced_end[:n], skip_special_tokens=False)
            if len(text) >= len(self.spec.end):
                return None if text[len(self.spec.end) :].strip() else n
        return None

    def closed_block(self, is_open: bool) -> list[int]:
        """Ids that close an open block of thinking, or, if it is not open, an empty block."""
        spec = self.spec
        text = ("" if is_open else spec.start) + spec.newline + spec.closing_text("")
        return list(self._encode(text))

    def answer_markers(self, calls: bool, opens: bool = False) -> AnswerMarkers:
        """What an answer does not show. ``calls``: it may call tools; ``opens``: the model may open
        thinking in it, because the prompt does not think."""
        spec, single = self.spec, self._tokenizer.single_token_id
        if spec.channels is not None:
            syntax = spec.channels
            starts = tuple(single(text) or 0 for text in syntax.header_starts)
            end = single(syntax.header_end) or 0
            ends = tuple(single(text) or 0 for text in syntax.message_ends)
            return AnswerMarkers(
                (), (), Channels(syntax, starts, end, (*starts, end, *ends), calls)
            )
        ids, texts = [], []
        openers = (spec.open_marker,) if opens else ()
        for text in dict.fromkeys((*spec.closers, *spec.hidden, *openers)):
            encoded = self._encode(text)
            own = len(encoded) == 1 or self._tokenizer.is_special(encoded[0])
            ids += [encoded] if own else []
            texts += [] if own else [text]
        opener = spec.open_marker if spec.open_marker in texts else ""
        opener_ids = tuple(self._encode(spec.open_marker)) if opens and not opener else ()
        return AnswerMarkers(tuple(ids), tuple(texts), None, opener, opener_ids)

    def num_tokens(self, text: str) -> int:
        """Length of ``text`` in tokens."""
        return len(self._encode(text)) if text else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.encode_phrase(text)


def encode_format(
    spec: ReasoningFormatSpec, tokenizer: Tokenizer, eos_token_ids: Sequence[int]
) -> ReasoningFormat:
    """A format in the ids of ``tokenizer``. Raises RequestError if a text that must be a single
    token is none; all others are spelt out where they are none."""
    missing = [text for text in spec.required if tokenizer.single_token_id(text) is None]
    if missing:
        raise RequestError(
            f"{PARAM} {spec.name}: the tokenizer has no single token for {', '.join(missing)}",
            param=PARAM,
        )
    opening = tokenizer.encode(spec.open_marker)
    singles = {text: tokenizer.single_token_id(text) for text in spec.ends or (spec.end,)}
    ids = {token for token in singles.values() if token is not None} | set(eos_token_ids)
    return ReasoningFormat(
        spec=spec,
        start=tuple(tokenizer.encode(spec.start)),
        open_marker=tuple(opening),
        triggers=tuple(sorted(ids)),
        end_markers=tuple(text for text, token in singles.items() if token is None),
        natural_end=tuple(tokenizer.encode(spec.end)),
        tools_end=tuple(tokenizer.encode(spec.tools_end or spec.end)),
        newline=tuple(tokenizer.encode(spec.newline)),
        newline_always=spec.newline_always,
        single_tokens=None not in singles.values()
        and (len(opening) == 1 or tokenizer.is_special(opening[0])),
        _tokenizer=tokenizer,
    )


def find_open_thinking(prompt: Sequence[int], reasoning: ReasoningFormat) -> int | None:
    """Index of the first thinking token if the prompt's last thinking is open, else None.

    Searches backwards for the last marker or trigger, which in a chat is near the end. For formats
    whose markers are single tokens.
    """
    marker, start = reasoning.open_marker, reasoning.start
    markers = {marker[0], *reasoning.triggers}
    for i in range(len(prompt) - 1, -1, -1):
        if prompt[i] in markers:
            if tuple(prompt[i : i + len(marker)]) != marker:
                return None
            whole = tuple(prompt[i : i + len(start)]) == start
            return i + (len(start) if whole else len(marker))
    return None
