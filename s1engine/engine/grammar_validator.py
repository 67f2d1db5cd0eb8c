"""Decides whether grammars are usable, by the verdicts of a process that tries them.

A verdict is a property of its grammar, so it is cached. A trial that an accident ends (a killed
process, no free file descriptor, a machine too busy) decides nothing: TryAgainError.
"""

import hashlib
import logging
import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

from s1engine.engine.grammar_worker import REFUSED, TOKENIZER, VALID
from s1engine.errors import RequestError, TryAgainError
from s1engine.tokenizer import Tokenizer

MAX_COMPILED = 32  # compiled grammars that are cached, each up to COMPILE_BYTES
MAX_REFUSED = 1024
VERDICT_WAIT_S = 20.0  # for a trial, which takes two seconds of a processor at most
WORKER = "s1engine.engine.grammar_worker"

logger = logging.getLogger(__name__)


class UntriedGrammarError(Exception):
    """A grammar has no verdict yet.

    Attributes:
        grammar: in llguidance's syntax.
        param: the field that gave it.
    """

    def __init__(self, grammar: str, param: str) -> None:
        super().__init__(f"{param} has not been tried yet")
        self.grammar = grammar
        self.param = param


class Verdicts:
    """The latest verdicts by grammar: the error, empty for a usable grammar.

    Usable grammars are forgotten as soon as a compiled one may be, so that a grammar is compiled
    without a trial only if its compiled form is cached.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._valid: OrderedDict[bytes, str] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()

    def get(self, grammar: str) -> str | None:
        """The verdict of a grammar; None if there is none."""
        key = _key(grammar)
        with self._lock:
            for verdicts in (self._valid, self._refused):
                if key in verdicts:
                    verdicts.move_to_end(key)
                    return verdicts[key]
        return None

    def add(self, grammar: str, error: str) -> None:
        """Keeps a verdict."""
        verdicts, limit = (self._refused, MAX_REFUSED) if error else (self._valid, MAX_COMPILED)
        with self._lock:
            verdicts[_key(grammar)] = error
            if len(verdicts) > limit:
                verdicts.popitem(last=False)


def _key(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest()


class GrammarValidator:
    """Validates grammars. The process that tries them starts with the first one and ends with this
    process. Any thread may validate, several at once."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_limit: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_limit = vocab_limit
        self._eos_token_ids = eos_token_ids
        self._verdicts = Verdicts()
        self._lock = threading.Lock()  # of the process
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def validate(self, grammar: str, param: str, *, wait: bool = True) -> None:
        """Raises RequestError naming ``param`` if ``grammar`` is wrong, or too costly to compile or
        to follow; TryAgainError if that could not be decided. ``wait`` False: UntriedGrammarError
        if it has no verdict yet."""
        error = self._verdicts.get(grammar)
        if error is None:
            if not wait:
                raise UntriedGrammarError(grammar, param)
            error = self._try(grammar, param)
            self._verdicts.add(grammar, error)
        if error:
            raise RequestError(f"{param} is not usable: {error}", param=param)

    def _try(self, grammar: str, param: str) -> str:
        """The error of a grammar, empty if it is usable. Raises TryAgainError."""
        verdict = b""
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs, self._lock:
                    socket.send_fds(self._worker_socket(), [b"?"], [theirs.fileno()])
                ours.settimeout(VERDICT_WAIT_S)
                ours.sendall(grammar.encode())
                ours.shutdown(socket.SHUT_WR)
                with ours.makefile("rb") as stream:
                    verdict = stream.read()
        except OSError as error:  # TimeoutError included
            logger.warning("a grammar could not be tried: %s", error)
        if verdict == VALID:
            return ""
        if not verdict.startswith(REFUSED):
            raise TryAgainError(f"{param} could not be checked now; try again")
        return verdict.removeprefix(REFUSED).decode()

    def _worker_socket(self) -> socket.socket:
        """The socket of the worker, which is started if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self._start_worker()
        assert self._control is not None
        return self._control

    def _start_worker(self) -> None:
        if self._control is not None:
            self._control.close()
        self._process = None
        self._control, theirs = socket.socketpair()
        self._control.settimeout(VERDICT_WAIT_S)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        try:
            self._control.sendall(self._encode_tokenizer())
        except OSError:
            process.kill()
            process.wait()
            raise
        self._process = process
        logger.debug("grammar worker started, process %d", process.pid)

    def _encode_tokenizer(self) -> bytes:
        ends = self._eos_token_ids
        json = self._tokenizer.to_json().encode()
        head = TOKENIZER.pack(self._vocab_limit, len(ends), len(json))
        return head + struct.pack(f"<{len(ends)}I", *ends) + json
