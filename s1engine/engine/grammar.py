"""Answers that keep to a grammar: which tokens may come next, from the first one of the answer on.

Thinking is free, and so is what the engine forces; a guide sees the sampled tokens of the answer
alone. Grammars are llguidance's. They are compiled in a thread, so that no step waits for one, and
only after ``check`` has found that they can be.
"""

import contextlib
import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from s1engine.engine.grammar_validator import GrammarValidator
from s1engine.engine.grammar_worker import LIMITS, NICE
from s1engine.engine.model_text import ModelText

MAX_KEPT = 64  # grammars, compiled


class GrammarMatcher:
    """The state of one answer. The first mask, by far the costliest, is computed at once."""

    def __init__(self, matcher: LLMatcher, text: ModelText) -> None:
        self._matcher = matcher
        self._text = text
        self._first: NDArray[np.bool_] | None = None
        self._first = self.mask()

    def copy(self) -> "GrammarMatcher":
        """Another answer at the same place."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def mask(self) -> NDArray[np.bool_]:
        """[V] true for ids that may come next; ends of text where the answer may end, and them
        alone where the grammar outgrew llguidance's limits."""
        if self._first is not None:
            return self._first
        limit = self._text.vocab_limit
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            mask = np.zeros(limit, np.bool_)
            mask[list(self._text.config.eos_token_ids)] = True
            return mask
        return np.unpackbits(bits, bitorder="little")[:limit].astype(np.bool_)

    def advance(self, tokens: Sequence[int]) -> None:
        """The answer went on with these."""
        if tokens and not self._matcher.is_stopped():
            self._first = None
            self._matcher.consume_tokens(list(tokens))


class GrammarCompiler:
    """Guides for one model."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._tokenizer: LLTokenizer | None = None  # a second for a large vocabulary
        self._validator = GrammarValidator(text)
        self._worker = ThreadPoolExecutor(1, "s1engine-grammar", initializer=_be_nice)
        self._kept: OrderedDict[str, Future[GrammarMatcher]] = OrderedDict()

    def validate(self, grammar: str) -> None:
        """Raises RequestError if ``grammar`` cannot be followed, or is too costly to. Any thread
        may call it."""
        self._validator.validate(grammar)

    def submit(self, grammar: str) -> "Future[GrammarMatcher]":
        """A guide at the beginning of its answer, to be copied for each; it is compiled in a thread
        that lets others run. From one thread only."""
        found = self._kept.pop(grammar, None) or self._worker.submit(self._compile, grammar)
        self._kept[grammar] = found
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return found

    def _compile(self, grammar: str) -> GrammarMatcher:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._text.tokenizer.to_json(),
                n_vocab=self._text.vocab_limit,
                eos_token=list(self._text.config.eos_token_ids),
            )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        return GrammarMatcher(matcher, self._text)


def _be_nice() -> None:
    """This thread runs when the others let it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
