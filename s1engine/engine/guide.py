"""Answers that keep to a grammar: which tokens may come next, from the first one of the answer on.

Thinking is free, and so is what the engine forces; a guide sees the sampled tokens of the answer
alone. Grammars are llguidance's, checked before a request is let in.
"""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from s1engine.engine.model_text import ModelText
from s1engine.errors import RequestError

# What a grammar costs, the whole step waits for: a quarter of a second to begin with, at worst,
# then some milliseconds a token.
LIMITS = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=20_000, max_lexer_states=20_000)


class Guide:
    """The state of one answer."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, text: ModelText) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        self._vocab_limit = text.vocab_limit
        self._ends = list(text.config.eos_token_ids)

    @property
    def error(self) -> str:
        """What ended the guidance, in one line; empty while it goes on."""
        return " ".join(str(self._matcher.get_error() or "").split())

    def mask(self) -> NDArray[np.bool_]:
        """[V] true for ids that may come next; ends of text where the answer may end, and them
        alone where the grammar outgrew llguidance's limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            mask = np.zeros(self._vocab_limit, np.bool_)
            mask[self._ends] = True
            return mask
        return np.unpackbits(bits, bitorder="little")[: self._vocab_limit].astype(np.bool_)

    def take(self, tokens: Sequence[int]) -> None:
        """The answer went on with these."""
        if tokens and not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(tokens))


class GuideMaker:
    """Guides for one model."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._tokenizer: LLTokenizer | None = None  # a second for a large vocabulary

    def _loaded(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._text.tokenizer.to_json(),
                n_vocab=self._text.vocab_limit,
                eos_token=list(self._text.config.eos_token_ids),
            )
        return self._tokenizer

    def check(self, grammar: str) -> None:
        """Raises RequestError if ``grammar`` cannot be followed, or is too costly to."""
        guide = self.start(grammar)
        guide.mask()
        if guide.error:
            raise RequestError(f"the grammar is not usable: {guide.error}", param="response_format")

    def start(self, grammar: str) -> Guide:
        """A guide at the beginning of its answer."""
        return Guide(self._loaded(), grammar, self._text)
