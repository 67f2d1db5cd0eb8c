"""The worker processes that share a model with this one, which is rank 0.

Owns the processes: starts, watches and ends them, and announces each launch. Its arrays stand in
shared memory. ``worker.Worker`` is the other end.

    rank 0                                       a worker
    configuration (one JSON line)         ->
    connect                              <->     connect (models/collective.py)
                                          <-     digest of the weights, KV blocks that fit
    blocks that all ranks have            ->
                                          <-     ready
    commands (rank_commands.py)           ->     computes its part; counts the commands whose
                                                 arrays it has read, in shared memory
    end of the stream                     ->     ends

If a rank dies, all end: a watching thread kills the others, so that no rank waits in an all-reduce
for a dead one, and the step under way, or the next one, raises EngineDeadError with the cause.
"""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.models.collective import Collective, NcclCollective, SharedCollective
from s1engine.models.shard import Shard
from s1engine.runner.memory import KVCapacity
from s1engine.runner.rank_commands import CommandsRead, RankCommand
from s1engine.runner.resolved_config import ResolvedConfig
from s1engine.runner.shared_memory import SharedMemory
from s1engine.runner.thinking_ends import ThinkingEnds

LOST_RANK = 3  # exit status of a rank that has lost another: its end is not the cause
END_TIMEOUT_S = 5.0  # for a rank to end by itself
POLL_S = 2e-5  # between looks at what the workers have read


class Workers(Protocol):
    """The other ranks, as the ModelRunner of any rank sees them. All ranks call in this order."""

    collective: Collective

    def sync_kv_capacity(self, weights_digest: str, capacity: KVCapacity) -> KVCapacity:
        """The capacity that every rank has. Raises ModelError if their weights differ."""

    def allocate(self, nbytes: int) -> Tensor:
        """Zeroed memory that all ranks share."""

    def wait_until_ready(self) -> None:
        """Returns on rank 0 when all ranks can compute steps."""


class WorkerGroup:
    """All ranks but 0, which is this process.

    The constructor starts them, with the arguments of their ModelRunner. Raises RequestError or
    ModelError as they do, EngineDeadError if one dies.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        path: Path,
        *,
        vocab_limit: int,
        ends: ThinkingEnds,
        newlines: np.ndarray,
    ) -> None:
        self.size = config.tensor_parallel_size
        self._threads = torch.get_num_threads()
        self._memory = SharedMemory()
        threads = max(self._threads // self.size, 1)
        if config.device == "cpu":
            torch.set_num_threads(threads)
        self._processes = _WorkerProcesses(self.size, self._memory.fd, threads)
        self._end = weakref.finalize(self, self._processes.close)
        try:
            store = self._processes.store
            arrays = self._processes.arrays
            np.savez(arrays, allow_pickle=False, newlines=newlines, **ends.to_arrays())
            start = {
                "config": asdict(config),
                "path": str(path),
                "threads": threads,
                "store": store,
                "arrays": arrays,
                "vocab_limit": vocab_limit,
            }
            self._processes.send(json.dumps(start).encode() + b"\n")
            self._receive_all()  # all have started, so connecting waits for no dead rank
            self.collective = connect(Shard(0, self.size), config.device, self._memory, store)
            counts = self._memory.allocate(CommandsRead.memory_bytes(self.size))
            self._commands_read = CommandsRead(counts)
            self._num_commands = 0  # announced
            self._processes.collective = self.collective
        except BaseException:
            self.close()
            raise

    def sync_kv_capacity(self, weights_digest: str, capacity: KVCapacity) -> KVCapacity:
        """See Workers."""
        answers = self._receive_all()
        for rank, answer in answers.items():
            if answer["weights_digest"] != weights_digest:
                raise ModelError(
                    f"rank {rank} has loaded other weights than rank 0: the model's directory must "
                    "be the same for all, and must not change while they start"
                )
        of_workers = [KVCapacity(*answer["capacity"]) for answer in answers.values()]
        common = KVCapacity(*map(min, zip(capacity, *of_workers, strict=True)))
        self._processes.send(json.dumps(common).encode() + b"\n")
        return common

    def allocate(self, nbytes: int) -> Tensor:
        """See Workers."""
        return self._memory.allocate(nbytes)

    def wait_until_ready(self) -> None:
        """See Workers."""
        self._receive_all()

    def _receive_all(self) -> dict[int, Any]:
        """One answer of each worker, by rank."""
        answers: dict[int, Any] = {}
        while len(answers) < self.size - 1:
            received = self._processes.answers.get()
            if received is None:
                raise self._processes.cause
            rank, answer = received
            answers[rank] = answer
        return answers

    @contextlib.contextmanager
    def execute(self, command: RankCommand | None) -> Iterator[None]:
        """Has the workers follow ``command`` while the body computes this rank's part; with None
        the body waits for what was launched. If it fails, the ranks are out of step, so all of
        them end."""
        self.check_health()
        try:
            if command is not None:
                self._num_commands += 1
                self._processes.send(command.pack())
            yield
            self.check_health()  # what a device computed while ranks ended counts for nothing
        except BaseException as error:
            lost = isinstance(error, RuntimeError | OSError) and self._processes.failed.wait(
                END_TIMEOUT_S
            )
            self._processes.fail(
                EngineDeadError("a step has failed, so the ranks of its engine ended")
            )
            self.close()
            if lost:
                raise self._processes.cause from error
            raise

    def wait_until_read(self) -> None:
        """Returns when all workers have read the arrays of the last command, so that the next may
        be written. Raises EngineDeadError if a rank has died."""
        while not self._commands_read.reached(self._num_commands):
            self.check_health()
            time.sleep(POLL_S)

    def check_health(self) -> None:
        """Raises EngineDeadError if a rank has died."""
        if self._processes.failed.is_set():
            raise self._processes.cause

    def close(self) -> None:
        """Ends the workers, and waits until they are gone."""
        if self._end.alive:
            self._end()
            self._memory.close()
            torch.set_num_threads(self._threads)


class _WorkerProcesses:
    """The processes and their answers. Holds no reference to the WorkerGroup, which may be garbage
    collected while a thread here listens."""

    def __init__(self, size: int, memory: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="s1engine-")
        self.store = f"{self._folder.name}/store"
        self.arrays = f"{self._folder.name}/arrays.npz"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.answers: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self.failed = threading.Event()
        self.cause: Exception = EngineDeadError("the ranks of this engine have ended")
        self.collective: Collective | None = None
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._num_lost = 0
        self._closing = False
        for rank in range(1, size):
            self._spawn(rank, size, memory, threads)
        self._listeners = [
            threading.Thread(target=self._listen, args=(rank,), daemon=True, name=f"rank-{rank}")
            for rank in range(1, size)
        ]
        for listener in self._listeners:
            listener.start()

    def _spawn(self, rank: int, size: int, memory: int, threads: int) -> None:
        ours, theirs = socket.socketpair()
        module = "s1engine.runner.worker"
        numbers = map(str, (rank, size, theirs.fileno(), memory))
        self._sockets.append(ours)
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *numbers],
                pass_fds=[theirs.fileno(), memory],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        )
        theirs.close()

    def send(self, data: bytes) -> None:
        """The same bytes to all workers."""
        for connection in self._sockets:
            connection.sendall(data)

    def _listen(self, rank: int) -> None:
        """Receives answers of a worker until it ends, then finds the cause of its end."""
        connection, process = self._sockets[rank - 1], self.processes[rank - 1]
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "error" in answer:
                    self.fail(_error(rank, answer))
                self.answers.put((rank, answer))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
        with self._lock:
            self._num_lost += process.returncode == LOST_RANK
            all_lost = self._num_lost == len(self.processes)
        if process.returncode != LOST_RANK or all_lost:  # else another rank's end is the cause
            self.fail(EngineDeadError(f"rank {rank} of the model {_ending(process.returncode)}"))

    def fail(self, cause: Exception) -> None:
        """Ends all workers, unless they are ending already. The first cause is kept."""
        with self._lock:
            if self._closing or self.failed.is_set():
                return
            self.cause = cause
            self.failed.set()
        self.answers.put(None)
        for process in self.processes:
            process.kill()
        if self.collective is not None:
            self.collective.abort()

    def close(self) -> None:
        """Lets all workers end, and waits for them."""
        with self._lock:
            self._closing = True
            self.failed.set()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        for process in self.processes:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:
            listener.join(END_TIMEOUT_S)
        for connection in self._sockets:
            connection.close()
        self._folder.cleanup()


def _error(rank: int, answer: dict[str, Any]) -> Exception:
    """The error that a worker reports."""
    message = f"rank {rank}: {answer['error']}"
    match answer["kind"]:
        case "RequestError":
            return RequestError(message, param=answer["param"])
        case "ModelError":
            return ModelError(message)
    return EngineDeadError(message)


def _ending(status: int | None) -> str:
    if status is None:
        return "has closed its connection"
    return f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"


def connect(shard: Shard, device: str, memory: SharedMemory, store: str) -> Collective:
    """The Collective of the ranks on that device; all ranks call this. ``store`` is the path of a
    file, empty at first."""
    if device == "cpu":
        return SharedCollective(shard, memory.allocate(SharedCollective.memory_bytes(shard.size)))
    return NcclCollective(shard, store)
