"""Tries one grammar: compiles it, and makes up the beginnings of answers that follow it.

A model may follow any branch, so a grammar whose masks fail or are too costly on one of them is
refused before a request begins. Runs in a process that may die of it.
"""

import random
import resource
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from s1engine.engine.grammar_limits import (
    COMPILE_BYTES,
    COMPILE_S,
    MAX_MASK_S,
    WALK_S,
    WALK_TOKENS,
    parser_limits,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Choice = Callable[[list[int]], int]  # of the next token among the allowed ones
MAX_COMPARED = 64  # allowed tokens of which a walk takes the longest

TOO_COSTLY = f"it takes more than {COMPILE_S:g} s or too much memory to compile or to follow"


def limit_process() -> None:
    """Lets the kernel end this process by SIGPROF or for lack of memory if a trial exceeds its
    limits."""
    signal.setitimer(signal.ITIMER_PROF, COMPILE_S + WALK_S + MAX_MASK_S)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + COMPILE_BYTES, mapped + COMPILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def try_grammar(tokenizer: "LLTokenizer", grammar: str) -> str:
    """The error of a grammar; empty if it is usable."""
    from llguidance import LLMatcher

    begin = time.process_time()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return error_of(matcher)
    if time.process_time() - begin > COMPILE_S:
        return TOO_COSTLY
    noise = random.Random(0)
    end = time.process_time() + WALK_S

    def longest(ids: list[int]) -> int:
        compared = noise.sample(ids, min(len(ids), MAX_COMPARED))
        return max(compared, key=lambda token: len(tokenizer.decode_bytes([token])))

    for choose in (noise.choice, longest):
        error = _walk(matcher.deep_copy(), choose, set(tokenizer.eos_tokens), end)
        if error:
            return error
    return ""


def error_of(matcher: "LLMatcher") -> str:
    """The error of a matcher in one line."""
    return " ".join(str(matcher.get_error()).split())


def _walk(matcher: "LLMatcher", choose: Choice, ends: set[int], end: float) -> str:
    """Follows a grammar until ``end``, in processor time. Returns its error."""
    for length in range(WALK_TOKENS):
        begin = time.process_time()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            return f"it fails after {length} tokens: {error_of(matcher)}"
        if time.process_time() - begin > MAX_MASK_S:
            return TOO_COSTLY
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        ids = [token for token in allowed if token not in ends]
        if not ids or time.process_time() > end:
            return ""
        matcher.consume_token(choose(ids))
    return ""
