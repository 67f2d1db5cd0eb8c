"""Is a grammar usable? Asked of a process that may die of the answer (see grammar_process).

Verdicts are kept, so a grammar that comes again costs nothing. The process starts with the first
grammar and ends with this one.
"""

import hashlib
import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict

from s1engine.engine.grammar_worker import COMPILE_S, FOLLOWABLE, TOKENIZER
from s1engine.engine.model_text import ModelText
from s1engine.errors import RequestError

MAX_KEPT = 1024  # verdicts
PATIENCE_S = 20.0  # for COMPILE_S of processor time, and for a tokenizer to load before
PARAM = "response_format"
TOO_COSTLY = f"it takes more than {COMPILE_S:g} s or too much memory to compile"


class GrammarValidator:
    """The verdicts for one model. Any thread may ask, several at once."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def validate(self, grammar: str) -> None:
        """Raises RequestError if ``grammar`` cannot be followed, or is too costly to."""
        key = hashlib.sha256(grammar.encode()).digest()
        error = self._verdicts.get(key)
        if error is None:
            error = self._ask(grammar)
            with self._lock:
                self._verdicts[key] = error
                if len(self._verdicts) > MAX_KEPT:
                    self._verdicts.popitem(last=False)
        if error:
            raise RequestError(f"the grammar is not usable: {error}", param=PARAM)

    def _ask(self, grammar: str) -> str:
        """What is wrong with a grammar, empty if nothing is."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                socket.send_fds(self._started(), [b"?"], [theirs.fileno()])
            ours.settimeout(PATIENCE_S)
            try:
                ours.sendall(grammar.encode())
                ours.shutdown(socket.SHUT_WR)
                with ours.makefile("rb") as stream:
                    verdict = stream.read()
            except OSError:  # a TimeoutError is one
                verdict = b""
        return "" if verdict == FOLLOWABLE else verdict.decode() or TOO_COSTLY

    def _started(self) -> socket.socket:
        """The socket of the process, started anew if it is not there."""
        if self._process is None or self._process.poll() is not None:
            if self._control is not None:
                self._control.close()
            self._control, theirs = socket.socketpair()
            module = "s1engine.engine.grammar_worker"
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                )
            self._control.sendall(self._tokenizer())
        assert self._control is not None
        return self._control

    def _tokenizer(self) -> bytes:
        ends = self._text.config.eos_token_ids
        json = self._text.tokenizer.to_json().encode()
        head = TOKENIZER.pack(self._text.vocab_limit, len(ends), len(json))
        return head + struct.pack(f"<{len(ends)}I", *ends) + json
