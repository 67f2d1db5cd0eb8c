"""Log-probabilities in the shapes of OpenAI's chats and completions, and of vLLM for prompts.

What a token adds to the answer's text is ``bytes`` of its own; tokens of thinking are apart. A long
list is made while it is sent.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from s1engine.outputs import TokenLogprob
from s1engine.prompt_logprobs import PromptLogprob, PromptLogprobs
from s1engine.server.json_pieces import INLINE_ITEMS, LazyList
from s1engine.tokenizer import Tokenizer

Json = dict[str, Any]

MAX_SPELLINGS = 4096  # tokens whose text a response keeps
LEAST_LOGPROB = -9999.0  # in JSON, which has no infinity


def json_list(items: Iterable[Any], count: int) -> Any:
    """Return a JSON list of ``count`` items; a long one is made while it is sent."""
    return LazyList(items) if count > INLINE_ITEMS else [*items]


class TokenSpelling:
    """The texts of one vocabulary's tokens. Calling it returns that of an id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes = lru_cache(MAX_SPELLINGS)(tokenizer.token_bytes)

    def __call__(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")


class ChatLogprobs:
    """``choices[].logprobs`` of chats: tokens of the answer in ``content``, others, if there are
    any, in ``reasoning``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = TokenSpelling(tokenizer)

    def format(self, entries: Sequence[TokenLogprob] | None) -> Json | None:
        """Return the entries of a choice, or of a chunk of it."""
        if entries is None:
            return None
        thinking = [entry for entry in entries if entry.thinking]
        content = [entry for entry in entries if not entry.thinking]
        own: Json = {"content": json_list(map(self._entry, content), len(content))}
        if thinking:
            own["reasoning"] = json_list(map(self._entry, thinking), len(thinking))
        return own

    def _entry(self, entry: TokenLogprob) -> Json:
        return {
            "token": self._text(entry.token_id),
            "bytes": list(entry.shown),
            "logprob": entry.logprob,
            "top_logprobs": [self._alternative(*pair) for pair in entry.top],
            "forced": entry.forced,
        }

    def _alternative(self, token: int, logprob: float) -> Json:
        data = list(self._text.bytes(token))
        return {"token": self._text(token), "bytes": data, "logprob": logprob}


class CompletionLogprobs:
    """``choices[].logprobs`` of completions: arrays over the tokens of the text, and arrays over
    those of the reasoning, if there are any. Offsets count characters of either text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = TokenSpelling(tokenizer)
        self._offsets: dict[tuple[int, bool], _Offset] = {}  # by choice, of text and reasoning

    def format(
        self,
        index: int,
        entries: Sequence[TokenLogprob] | None,
        prompt: PromptLogprobs | None = None,
        prompt_text: str = "",
        k: int = 0,
    ) -> Json | None:
        """Return the arrays of choice ``index``, or of a chunk of it.

        Args:
            prompt: precedes the entries, as the beginning ``prompt_text`` of the text, with ``k``
                alternatives of each token.
        """
        if entries is None:
            return None
        content = [entry for entry in entries if not entry.thinking]
        thinking = [entry for entry in entries if entry.thinking]
        own = self._arrays(content, self._offset(index, False), prompt, prompt_text, k)
        if thinking:
            own["reasoning"] = self._arrays(thinking, self._offset(index, True))
        return own

    def _offset(self, index: int, thinking: bool) -> "_Offset":
        return self._offsets.setdefault((index, thinking), _Offset())

    def _arrays(
        self,
        entries: Sequence[TokenLogprob],
        offset: "_Offset",
        prompt: PromptLogprobs | None = None,
        prompt_text: str = "",
        k: int = 0,
    ) -> Json:
        before = () if prompt is None else prompt
        count = len(before) + len(entries)

        def column(
            of_prompt: Callable[[PromptLogprob | None], Any],
            of_entry: Callable[[TokenLogprob], Any],
        ) -> Any:
            return json_list(chain(map(of_prompt, before), map(of_entry, entries)), count)

        ids = () if prompt is None else prompt.token_ids
        tokens = chain(map(self._text, ids), (self._text(entry.token_id) for entry in entries))
        offsets = chain(
            self._prompt_offsets(ids, prompt_text, offset),
            (offset.push(entry.shown) for entry in entries),
        )
        return {
            "tokens": json_list(tokens, count),
            "token_logprobs": column(
                lambda item: None if item is None else max(item.logprob, LEAST_LOGPROB),
                lambda entry: entry.logprob,
            ),
            "top_logprobs": column(
                lambda item: None if item is None else self._alternatives(item.top[:k]),
                lambda entry: self._alternatives(entry.top),
            ),
            "text_offset": json_list(offsets, count),
            "forced": column(lambda _: 0, lambda entry: int(entry.forced)),
        }

    def _prompt_offsets(
        self, ids: Sequence[int], prompt_text: str, offset: "_Offset"
    ) -> Iterable[int]:
        """Yield where each token of the prompt begins. Tokens that the tokenizer added in front of
        the text begin where the text does."""
        size = len(b"".join(map(self._text.bytes, ids)).decode(errors="replace"))
        added = max(size - len(prompt_text), 0)
        own = _Offset()
        for token in ids:
            yield min(max(own.push(self._text.bytes(token)) - added, 0), len(prompt_text))
        if ids:
            offset.begin(len(prompt_text))

    def _alternatives(self, top: Sequence[tuple[int, float]]) -> Json:
        best: Json = {}
        for token, logprob in top:  # of several tokens with one text the likeliest
            best.setdefault(self._text(token), logprob)
        return best


class _Offset:
    """Characters of a growing text."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._size = 0

    def begin(self, size: int) -> None:
        """Let the text begin with ``size`` other characters."""
        self._size = size

    def push(self, data: bytes) -> int:
        """Add bytes, and return the index of the character in which they begin."""
        at = self._size
        self._size += len(self._utf8.decode(data))
        return at


def prompt_logprobs(scores: PromptLogprobs, k: int, tokenizer: Tokenizer) -> Any:
    """Return vLLM's list over a prompt: null for the first token; for each other one an object by
    token id, of the token itself and of the ``k`` likeliest ones."""
    text = TokenSpelling(tokenizer)

    def entry(token: int, logprob: float, rank: int) -> Json:
        own = {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank}
        return {**own, "decoded_token": text(token)}

    def item(score: PromptLogprob | None) -> Json | None:
        if score is None:
            return None
        own = {str(score.token_id): entry(score.token_id, score.logprob, score.rank)}
        top = enumerate(score.top[:k], start=1)
        return own | {str(token): entry(token, value, rank) for rank, (token, value) in top}

    return json_list(map(item, scores), len(scores))
