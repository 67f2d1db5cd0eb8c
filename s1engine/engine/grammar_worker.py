"""The process that tries grammars before they are accepted:
``python -m s1engine.engine.grammar_worker FD``.

llguidance can take minutes and gigabytes to compile a schema of a few hundred bytes, past all of
its own limits. So each grammar is compiled here first, in a fork that dies of too much time or
memory without harm to any other request. Knows token bytes and grammars, nothing of models.

FD is a socket. Its first message is the tokenizer. Each further message carries another socket,
over which a grammar arrives and its verdict is sent.
"""

import gc
import os
import resource
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

COMPILE_S = 1.0  # processor time
COMPILE_BYTES = 2**30  # of memory beyond what the tokenizer takes
NICE = 10  # lower priority than the model's threads
VALID = b"+"  # a verdict; any other verdict is an error message
TOKENIZER = struct.Struct("<IIQ")  # number of ids, of ends of text, bytes of the tokenizer's JSON


def cost_limits() -> "LLParserLimits":
    """Of a grammar. An engine step waits for its share, some milliseconds per token."""
    from llguidance import LLParserLimits  # the engine process imports this file without it

    return LLParserLimits(step_lexer_fuel=20_000, max_lexer_states=20_000)


def receive_tokenizer(connection: socket.socket) -> "LLTokenizer":
    """Receives the first message: TOKENIZER, the ends of text, JSON."""
    from llguidance import LLTokenizer

    head = connection.recv(TOKENIZER.size, socket.MSG_WAITALL)
    num_ids, num_ends, size = TOKENIZER.unpack(head)
    ends = struct.unpack(f"<{num_ends}I", connection.recv(4 * num_ends, socket.MSG_WAITALL))
    json = connection.recv(size, socket.MSG_WAITALL).decode()
    return LLTokenizer(json, n_vocab=num_ids, eos_token=list(ends))


def serve(connection: socket.socket) -> None:
    """Forks for each socket that arrives, until the other end closes."""
    tokenizer = receive_tokenizer(connection)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the forks
    os.nice(NICE)
    gc.freeze()
    while True:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        if not fds:
            return
        if os.fork() == 0:
            connection.close()
            with socket.socket(fileno=fds[0]) as client:
                _send_verdict(tokenizer, client)
            os._exit(0)
        os.close(fds[0])


def _send_verdict(tokenizer: "LLTokenizer", client: socket.socket) -> None:
    """Compiles the grammar of ``client``. If SIGPROF or lack of memory ends this process, the
    missing verdict means "too costly"."""
    from llguidance import LLMatcher  # loaded before the fork already

    with client.makefile("rb") as stream:
        grammar = stream.read().decode()
    signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
    limit = _address_space() + COMPILE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an abort for lack of memory prints a long text
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=cost_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    error = " ".join(str(matcher.get_error() or "").split())
    client.sendall(error.encode() or VALID)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> None:
    """Serves on the file descriptor in the arguments, until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
