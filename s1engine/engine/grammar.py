"""Answers that follow a grammar: which tokens may come next, from the first one of the answer on.

Thinking is free, and so are forced tokens; a matcher sees only the sampled tokens of the answer.
Grammars are llguidance's. GrammarValidator tries each one in a worker process first, because it may
be too costly to compile; GrammarCompiler then compiles it in a thread, so that no step waits.
"""

import contextlib
import copy
import hashlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from s1engine.engine.grammar_worker import COMPILE_S, NICE, TOKENIZER, VALID, cost_limits
from s1engine.errors import RequestError
from s1engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 64  # compiled grammars that are cached
MAX_VERDICTS = 1024
VERDICT_WAIT_S = 20.0  # COMPILE_S of processor time, and before it the load of a tokenizer
WORKER = "s1engine.engine.grammar_worker"
TOO_COSTLY = f"it takes more than {COMPILE_S:g} s or too much memory to compile"

logger = logging.getLogger(__name__)


class GrammarMatcher:
    """The state of one answer within its grammar. The first mask is by far the costliest, so the
    constructor computes it."""

    def __init__(
        self, matcher: "LLMatcher", vocab_limit: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._vocab_limit = vocab_limit
        self._eos_token_ids = list(eos_token_ids)
        self._first_mask: NDArray[np.uint8] | None = None
        self._first_mask = self.mask()

    def copy(self) -> "GrammarMatcher":
        """An independent matcher in the same state."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def mask(self) -> NDArray[np.uint8]:
        """The ids that may come next: a bitmask [ceil(V / 8)], the lowest bit of a byte first.
        Ends of text are allowed where the answer may end; they alone are allowed where the grammar
        exceeded llguidance's limits."""
        if self._first_mask is not None:
            return self._first_mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            allowed = np.zeros(self._vocab_limit, np.bool_)
            allowed[self._eos_token_ids] = True
            return np.packbits(allowed, bitorder="little")
        return bits[: -(-self._vocab_limit // 8)]

    def advance(self, tokens: Sequence[int]) -> None:
        """Consumes the next sampled tokens of the answer."""
        if tokens and not self._matcher.is_stopped():
            self._first_mask = None
            self._matcher.consume_tokens(list(tokens))


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
        self._tokenizer: LLTokenizer | None = None  # takes a second for a large vocabulary
        self._validator = GrammarValidator(tokenizer, vocab_limit, eos_token_ids)
        self._thread = ThreadPoolExecutor(1, "s1engine-grammar", initializer=_lower_priority)
        self._compiled: OrderedDict[str, Future[GrammarMatcher]] = OrderedDict()

    def validate(self, grammar: str, param: str) -> None:
        """Raises RequestError naming ``param`` if ``grammar`` is wrong or too costly. Any thread
        may call it."""
        self._validator.validate(grammar, param)

    def submit(self, grammar: str) -> "Future[GrammarMatcher]":
        """Compiles ``grammar`` in a thread of low priority. The result is a matcher at the
        beginning of its answer, to be copied for each answer. Call from one thread only."""
        matcher = self._compiled.pop(grammar, None) or self._thread.submit(self._compile, grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return matcher

    def _compile(self, grammar: str) -> GrammarMatcher:
        from llguidance import LLMatcher, LLTokenizer  # loads only where a grammar needs it

        begin = time.monotonic()
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                self._source.to_json(), n_vocab=self._vocab_limit, eos_token=self._eos_token_ids
            )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=cost_limits())
        compiled = GrammarMatcher(matcher, self._vocab_limit, self._eos_token_ids)
        elapsed = time.monotonic() - begin
        logger.debug("grammar of %d characters compiled in %.3f s", len(grammar), elapsed)
        return compiled


def _lower_priority() -> None:
    """Lets the other threads of the engine run before this one."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class GrammarValidator:
    """Decides whether grammars are usable: compiles them in a worker process that may die of it.

    Verdicts are cached. The worker starts with the first grammar and ends with this process. Any
    thread may validate, several at once.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_limit: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_limit = vocab_limit
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def validate(self, grammar: str, param: str) -> None:
        """Raises RequestError naming ``param`` if ``grammar`` is wrong, or too costly to compile or
        to follow."""
        key = hashlib.sha256(grammar.encode()).digest()
        error = self._verdicts.get(key)
        if error is None:
            error = self._try_in_worker(grammar)
            with self._lock:
                self._verdicts[key] = error
                if len(self._verdicts) > MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
        if error:
            raise RequestError(f"{param} is not usable: {error}", param=param)

    def _try_in_worker(self, grammar: str) -> str:
        """The error of a grammar, empty if it is valid."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                socket.send_fds(self._worker_socket(), [b"?"], [theirs.fileno()])
            ours.settimeout(VERDICT_WAIT_S)
            try:
                ours.sendall(grammar.encode())
                ours.shutdown(socket.SHUT_WR)
                with ours.makefile("rb") as stream:
                    verdict = stream.read()
            except OSError:  # TimeoutError included
                verdict = b""
        return "" if verdict == VALID else verdict.decode() or TOO_COSTLY

    def _worker_socket(self) -> socket.socket:
        """The socket of the worker, which is started if it does not run."""
        if self._process is None or self._process.poll() is not None:
            if self._control is not None:
                self._control.close()
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", WORKER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                )
            self._control.sendall(self._encode_tokenizer())
            logger.debug("grammar worker started, process %d", self._process.pid)
        assert self._control is not None
        return self._control

    def _encode_tokenizer(self) -> bytes:
        ends = self._eos_token_ids
        json = self._tokenizer.to_json().encode()
        head = TOKENIZER.pack(self._vocab_limit, len(ends), len(json))
        return head + struct.pack(f"<{len(ends)}I", *ends) + json
