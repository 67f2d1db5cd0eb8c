"""The process in which grammars are tried before they are let in:
``python -m s1engine.engine.grammar_worker FD``.

A schema of a few hundred bytes can take llguidance minutes and gigabytes to compile, past every
limit that it has itself. So each grammar is compiled here first, in a fork of its own that dies of
too much time or memory, and nobody else notices. Knows token bytes and grammars, nothing of models.

FD is a socket. The first message on it is the tokenizer; each further one carries another socket,
on which a grammar comes and the verdict goes.
"""

import gc
import os
import resource
import signal
import socket
import struct
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

COMPILE_S = 1.0  # processor time
COMPILE_BYTES = 2**30  # of memory beyond what the tokenizer takes
NICE = 10  # the model goes first
LIMITS = LLParserLimits(step_lexer_fuel=20_000, max_lexer_states=20_000)
"""What a grammar may cost; a step of the engine waits for its share, some milliseconds a token."""
FOLLOWABLE = b"+"  # a verdict; any other is what is wrong
TOKENIZER = struct.Struct("<IIQ")  # number of ids, of ends of text, bytes of the tokenizer's JSON


def load(head: bytes, connection: socket.socket) -> LLTokenizer:
    """The tokenizer of the first message: TOKENIZER, the ends of text, JSON."""
    num_ids, num_ends, size = TOKENIZER.unpack(head)
    ends = struct.unpack(f"<{num_ends}I", connection.recv(4 * num_ends, socket.MSG_WAITALL))
    json = connection.recv(size, socket.MSG_WAITALL).decode()
    return LLTokenizer(json, n_vocab=num_ids, eos_token=list(ends))


def serve(connection: socket.socket) -> None:
    """Forks for each socket that comes, until the other end leaves."""
    tokenizer = load(connection.recv(TOKENIZER.size, socket.MSG_WAITALL), connection)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no fork has to be waited for
    os.nice(NICE)
    gc.freeze()
    while True:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        if not fds:
            return
        if os.fork() == 0:
            connection.close()
            with socket.socket(fileno=fds[0]) as asking:
                _try(tokenizer, asking)
            os._exit(0)
        os.close(fds[0])


def _try(tokenizer: LLTokenizer, asking: socket.socket) -> None:
    """Death, by SIGPROF or for want of memory, is a verdict too: no answer."""
    with asking.makefile("rb") as stream:
        grammar = stream.read().decode()
    signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
    bound = _address_space() + COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an abort for want of memory says so at length
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    error = " ".join(str(matcher.get_error() or "").split())
    asking.sendall(error.encode() or FOLLOWABLE)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> None:
    """Serves on the file descriptor in the arguments; whoever started this decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
