"""A worker process, a rank of a shared model other than 0: ``python -m s1engine.runner.worker``.

``WorkerGroup`` starts it. It loads its part of the model, then computes its part of every launch
that rank 0 announces. It schedules nothing and samples nothing in single steps; in a multi-step
decode it keeps the rows' state as rank 0 does. It ends when rank 0 ends, in whatever way.
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

from s1engine.models.collective import Collective, CollectiveError
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard
from s1engine.runner.memory import KVCapacity
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.rank_commands import NUM_BYTES, CommandsRead, RankCommand
from s1engine.runner.resolved_config import ResolvedConfig
from s1engine.runner.shared_memory import SharedMemory
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.runner.worker_group import LOST_RANK, connect

GRACE_S = 1.0  # for an orderly end after rank 0 has ended


class Worker:
    """The ``Workers`` of a worker: its connection to rank 0."""

    def __init__(
        self, connection: socket.socket, collective: Collective, memory: SharedMemory
    ) -> None:
        self.collective = collective
        self._socket = connection
        self._memory = memory

    def sync_kv_capacity(self, weights_digest: str, capacity: KVCapacity) -> KVCapacity:
        """See Workers; rank 0 compares."""
        _send(self._socket, weights_digest=weights_digest, capacity=capacity)
        return KVCapacity(*_receive_line(self._socket))

    def allocate(self, nbytes: int) -> Tensor:
        """See Workers."""
        return self._memory.allocate(nbytes)

    def wait_until_ready(self) -> None:
        """See Workers."""
        _send(self._socket, ready=True)


def compute_steps(connection: socket.socket, shard: Shard, memory: SharedMemory) -> None:
    """Loads the model and computes steps until rank 0 ends. Raises ConnectionError then."""
    start = _receive_line(connection)
    config = ResolvedConfig(**start["config"])
    if config.device == "cuda":
        torch.cuda.set_device(shard.rank)
    torch.set_num_threads(start["threads"])
    _send(connection, started=True)
    collective = connect(shard, config.device, memory, start["store"])
    commands_read = CommandsRead(memory.allocate(CommandsRead.memory_bytes(shard.size)))
    arrays = np.load(start["arrays"])
    model = ModelConfig.from_dir(start["path"])
    runner = ModelRunner(
        config,
        model,
        Path(start["path"]),
        vocab_limit=start["vocab_limit"],
        ends=ThinkingEnds.from_arrays(arrays),
        newlines=arrays["newlines"],
        progress=False,
        workers=Worker(connection, collective, memory),
    )
    while True:
        runner.follow(RankCommand.unpack(_receive(connection, NUM_BYTES)))
        commands_read.count(shard.rank)


def _send(connection: socket.socket, **answer: Any) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("rank 0 has ended")
    return data


def _receive_line(connection: socket.socket) -> Any:
    """Reads no further than the end of the line: commands may follow."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += _receive(connection, 1)
    return json.loads(line)


def _exit_with_rank_0(connection: socket.socket) -> None:
    """Ends this process when rank 0 ends, even while it waits for rank 0 in an all-reduce."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    time.sleep(GRACE_S)
    os._exit(LOST_RANK)


def _report(connection: socket.socket, error: Exception) -> None:
    with contextlib.suppress(OSError):
        _send(
            connection,
            error=str(error) or type(error).__name__,
            kind=type(error).__name__,
            param=getattr(error, "param", None),
        )


def main() -> None:
    """Arguments: rank, number of ranks, file descriptors of the socket and of the shared memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, size, fd, memory = map(int, sys.argv[1:])
    logging.basicConfig(format=f"%(levelname)s: rank {rank}: %(message)s", level=logging.ERROR)
    connection = socket.socket(fileno=fd)
    threading.Thread(target=_exit_with_rank_0, args=(connection,), daemon=True).start()
    status = 0
    try:
        compute_steps(connection, Shard(rank, size), SharedMemory(memory))
    except ConnectionError:
        pass
    except CollectiveError:
        status = LOST_RANK
    except Exception as error:
        _report(connection, error)
        status = 1
    os._exit(status)  # at once: other ranks may be gone, and nothing here needs an orderly end


if __name__ == "__main__":
    main()
