"""A rank of a model other than the first: ``python -m s1engine.runner.worker``, as ``WorkerGroup``
starts it.

Loads its part, then computes its part of every step that the first rank tells of; it schedules and
samples nothing. It ends when the first rank does, however that ends.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1engine.config import EngineConfig
from s1engine.models.collective import Collective, CollectiveError
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.shared_memory import SharedMemory
from s1engine.runner.worker_group import LOST, SIZES, KVCapacity, connect

GRACE_S = 1.0  # to end in order after the first rank has


class Worker:
    """``Workers`` of a rank other than the first: where that is."""

    def __init__(
        self, connection: socket.socket, collective: Collective, memory: SharedMemory
    ) -> None:
        self.collective = collective
        self._socket = connection
        self._memory = memory

    def sync_kv_capacity(self, weights_digest: str, room: KVCapacity) -> KVCapacity:
        """See Workers; the first rank compares."""
        _send(self._socket, weights_digest=weights_digest, room=room)
        max_model_len, num_blocks = _receive_line(self._socket)
        return max_model_len, num_blocks

    def share(self, size: int) -> Tensor:
        """See Workers."""
        return self._memory.take(size)

    def ready(self) -> None:
        """See Workers."""
        _send(self._socket, ready=True)

    def close(self) -> None:
        """This process ends as a whole."""


def run(connection: socket.socket, shard: Shard, memory: SharedMemory) -> None:
    """Computes steps until the first rank ends. Raises ConnectionError then."""
    start = _receive_line(connection)
    config = EngineConfig(**start["config"])
    if config.device == "cuda":
        torch.cuda.set_device(shard.rank)
    torch.set_num_threads(start["threads"])
    _send(connection, here=True)
    collective = connect(shard, config.device, memory, start["store"])
    model = ModelConfig.from_dir(start["path"])
    runner = ModelRunner(
        config,
        model,
        Path(start["path"]),
        vocab_limit=model.vocab_size,  # what may be sampled is the first rank's business
        triggers=(),
        newlines=np.zeros(0, np.uint8),
        progress=False,
        workers=Worker(connection, collective, memory),
    )
    while True:
        runner.follow(SIZES.unpack(_receive(connection, SIZES.size)))


def _send(connection: socket.socket, **answer: Any) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("the first rank has ended")
    return data


def _receive_line(connection: socket.socket) -> Any:
    """Reads no further than the line's end: sizes of steps may follow."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += _receive(connection, 1)
    return json.loads(line)


def _end_with(connection: socket.socket) -> None:
    """Ends this process when the first rank ends, whatever it is doing then: it may be waiting for
    that rank in a sum."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    time.sleep(GRACE_S)
    os._exit(LOST)


def _report(connection: socket.socket, error: Exception) -> None:
    with contextlib.suppress(OSError):
        _send(
            connection,
            error=str(error) or type(error).__name__,
            kind=type(error).__name__,
            param=getattr(error, "param", None),
        )


def main() -> None:
    """The arguments: rank, ranks, file descriptors of the socket and of what steps share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, size, fd, memory = map(int, sys.argv[1:])
    logging.basicConfig(format=f"%(levelname)s: rank {rank}: %(message)s", level=logging.ERROR)
    connection = socket.socket(fileno=fd)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    status = 0
    try:
        run(connection, Shard(rank, size), SharedMemory(memory))
    except ConnectionError:
        pass
    except CollectiveError:
        status = LOST
    except Exception as error:
        _report(connection, error)
        status = 1
    os._exit(status)  # at once: other ranks may be gone, and nothing here is worth an orderly end


if __name__ == "__main__":
    main()
