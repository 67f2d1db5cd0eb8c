"""The process that tries grammars before they are accepted:
``python -m s1engine.engine.grammar_worker FD``.

llguidance can take minutes and gigabytes to compile a schema of a few hundred bytes, past all of
its own limits. So each grammar is tried here first, in a fork that dies of too much time or memory
without harm to any other request. Knows token bytes and grammars, nothing of models.

FD is a socket. Its first message is the tokenizer. Each further message carries another socket,
over which a grammar arrives and its verdict is sent: VALID, or REFUSED and a message. A trial that
ends by an accident sends none. If the other end closes that socket, the trial is killed.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from s1engine.engine.grammar_limits import MAX_TRIALS, NICE
from s1engine.engine.grammar_trial import TOO_COSTLY, limit_process, try_grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

VALID = b"+"
REFUSED = b"-"
TOKENIZER = struct.Struct("<IIQ")  # number of ids, of ends of text, bytes of the tokenizer's JSON
# How a trial dies of its limits: of time, and in several ways of memory.
COSTLY_SIGNALS = {signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS}
OUT_OF_MEMORY = 3  # exit status
READ_BYTES = 2**16


def receive_tokenizer(connection: socket.socket) -> "LLTokenizer":
    """Receives the first message: TOKENIZER, the ends of text, JSON."""
    from llguidance import LLTokenizer

    head = connection.recv(TOKENIZER.size, socket.MSG_WAITALL)
    num_ids, num_ends, size = TOKENIZER.unpack(head)
    ends = struct.unpack(f"<{num_ends}I", connection.recv(4 * num_ends, socket.MSG_WAITALL))
    json = connection.recv(size, socket.MSG_WAITALL).decode()
    return LLTokenizer(json, n_vocab=num_ids, eos_token=list(ends))


@dataclass(slots=True)
class Trial:
    """A fork that tries the grammar of ``client``, and the pipe that brings its verdict."""

    client: socket.socket
    pid: int
    pipe: int
    verdict: bytearray = field(default_factory=bytearray)

    def end(self) -> None:
        """Reaps the fork, which has closed its pipe, and sends its verdict."""
        os.close(self.pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        verdict = bytes(self.verdict) if status == 0 else b""
        if -status in COSTLY_SIGNALS or status == OUT_OF_MEMORY:
            verdict = REFUSED + TOO_COSTLY.encode()
        with self.client, contextlib.suppress(OSError):  # its client may have left
            self.client.sendall(verdict)
            self.client.shutdown(socket.SHUT_RDWR)  # a later fork holds this socket too


class GrammarWorker:
    """Tries the grammars that arrive on ``connection``, MAX_TRIALS at once."""

    def __init__(self, connection: socket.socket, tokenizer: "LLTokenizer") -> None:
        self._connection = connection
        self._tokenizer = tokenizer
        self._trials: dict[int, Trial] = {}  # by file descriptor of the pipe

    def serve(self) -> None:
        """Serves until the other end closes."""
        while True:
            poll = select.poll()
            if len(self._trials) < MAX_TRIALS:
                poll.register(self._connection, select.POLLIN)
            clients = {}
            for trial in self._trials.values():
                poll.register(trial.pipe, select.POLLIN)
                poll.register(trial.client, 0)  # reports only that both directions are closed
                clients[trial.client.fileno()] = trial
            for fd, _ in poll.poll():
                if fd == self._connection.fileno():
                    if not self._begin_trial():
                        return self._kill_all()
                elif fd in self._trials:
                    self._read(self._trials[fd])
                elif clients[fd].pipe in self._trials:
                    os.kill(clients[fd].pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        for trial in self._trials.values():
            os.kill(trial.pid, signal.SIGKILL)

    def _read(self, trial: Trial) -> None:
        data = os.read(trial.pipe, READ_BYTES)
        trial.verdict += data
        if not data:
            del self._trials[trial.pipe]
            trial.end()

    def _begin_trial(self) -> bool:
        """Forks for the next socket. False: there is none, because the other end has closed."""
        _, fds, _, _ = socket.recv_fds(self._connection, 1, 1)
        if not fds:
            return False
        client = socket.socket(fileno=fds[0])
        try:
            pipe, theirs = os.pipe()
            pid = os.fork()
        except OSError as error:
            print(f"no grammar can be tried: {error}", file=sys.stderr)
            client.close()
            return True
        if pid == 0:
            self._connection.close()
            os.close(pipe)
            os._exit(_try(self._tokenizer, client, theirs))
        os.close(theirs)
        self._trials[pipe] = Trial(client, pid, pipe)
        return True


def _try(tokenizer: "LLTokenizer", client: socket.socket, pipe: int) -> int:
    """Tries the grammar of ``client`` and writes the verdict. Returns the exit status."""
    with client.makefile("rb") as stream:
        grammar = stream.read().decode()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an abort for lack of memory prints a long text
    limit_process()
    try:
        error = try_grammar(tokenizer, grammar)
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return 1
    os.write(pipe, REFUSED + error.encode() if error else VALID)
    return 0


def main() -> None:
    """Serves on the file descriptor in the arguments, until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    tokenizer = receive_tokenizer(connection)
    os.nice(NICE)
    gc.freeze()
    GrammarWorker(connection, tokenizer).serve()


if __name__ == "__main__":
    main()
