"""Answers that follow a grammar: which tokens may come next, from the first one of the answer on.

Thinking is free, and so are forced tokens; a matcher sees only the sampled tokens of the answer.
Grammars are llguidance's. GrammarValidator has each one tried in a worker process first, because it
may be too costly; GrammarCompiler then compiles it in a thread, so that no step waits.
"""

import contextlib
import copy
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from s1engine.engine.grammar_limits import MAX_MASK_S, MAX_TRIALS, NICE, parser_limits
from s1engine.engine.grammar_trial import error_of
from s1engine.engine.grammar_validator import MAX_COMPILED, GrammarValidator
from s1engine.errors import RequestFailedError
from s1engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)


class GrammarMatcher:
    """The state of one answer within its grammar.

    The constructor computes the first mask, by far the costliest. Later ones are computed as
    MaskThreads decides; ``mask`` is None while a thread does it.

    Attributes:
        mask: the ids that may come next, a bitmask [ceil(V / 8)] uint8, the lowest bit of a byte
            first; ends of text are allowed where the answer may end.
    """

    def __init__(self, matcher: "LLMatcher", vocab_limit: int) -> None:
        self._matcher = matcher
        self._mask_bytes = -(-vocab_limit // 8)
        self._num_tokens = 0
        self.mask: NDArray[np.uint8] | None = self._compute_mask()

    def copy(self) -> "GrammarMatcher":
        """An independent matcher in the same state."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def advance(self, tokens: Sequence[int]) -> float:
        """Consumes the next sampled tokens of the answer and computes the mask after them. Returns
        its processor time in seconds. Raises RequestFailedError if the grammar is too costly."""
        begin = time.thread_time()
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(tokens))
            self._num_tokens += len(tokens)
        mask = self._compute_mask()
        seconds = time.thread_time() - begin
        if seconds > MAX_MASK_S:
            raise self._failure(f"the tokens that may follow took {seconds:.2f} s to compute")
        self.mask = mask
        return seconds

    def _compute_mask(self) -> NDArray[np.uint8]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._failure(error_of(self._matcher))
        return bits[: self._mask_bytes]

    def _failure(self, reason: str) -> RequestFailedError:
        return RequestFailedError(
            f"the grammar of the answer is too costly after {self._num_tokens} tokens: {reason}"
        )


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        vocab_limit: ids below it may be sampled.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_limit: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._source = tokenizer
        self._vocab_limit = vocab_limit
        self._eos_token_ids = list(eos_token_ids)
        self._loading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None  # takes a second for a large vocabulary
        self.validator = GrammarValidator(tokenizer, vocab_limit, eos_token_ids)
        # As many as grammars are tried at once: no grammar waits here for those of others.
        self._threads = ThreadPoolExecutor(
            MAX_TRIALS, "s1engine-grammar", initializer=lower_priority
        )
        self._compiled: OrderedDict[str, Future[GrammarMatcher]] = OrderedDict()

    def submit(self, grammar: str) -> "Future[GrammarMatcher]":
        """Compiles ``grammar`` in a thread of low priority. The result is a matcher at the
        beginning of its answer, to be copied for each answer. Call from one thread only."""
        matcher = self._compiled.pop(grammar, None)
        if matcher is None or (matcher.done() and matcher.exception()):
            matcher = self._threads.submit(self._compile, grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher

    def _compile(self, grammar: str) -> GrammarMatcher:
        from llguidance import LLMatcher, LLTokenizer  # loads only where a grammar needs it

        begin = time.monotonic()
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._source.to_json(), n_vocab=self._vocab_limit, eos_token=self._eos_token_ids
                )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())
        compiled = GrammarMatcher(matcher, self._vocab_limit)
        elapsed = time.monotonic() - begin
        logger.debug("grammar of %d characters compiled in %.3f s", len(grammar), elapsed)
        return compiled


def lower_priority() -> None:
    """Lets the other threads of the engine run before this one."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
