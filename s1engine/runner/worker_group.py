"""The ranks of a model that several processes share, as the first of them sees the others.

Owns their processes: starts them, watches them, ends them. Tells them of each step; what stands in
it they read from memory that all share. The others see this as ``worker.Worker``.

    first rank                                   another
    start, configuration (one JSON line)  ->
    connect                              <->     connect (models/collective.py)
                                          <-     weights_digest of the weights, KV blocks that fit
    blocks that all have                  ->
                                          <-     ready
    sizes of a step (SIZES), many times   ->     computes its part
    end of the stream                     ->     ends

If a rank dies, everything ends: a watching thread ends the others, so that nobody waits in a sum
for one who will not come, and the step, or the next one, raises EngineDeadError with the cause.
"""

import contextlib
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from s1engine.config import EngineConfig
from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.models.collective import Collective, NcclCollective, SharedCollective
from s1engine.models.shard import Shard
from s1engine.runner.shared_memory import SharedMemory

SIZES = struct.Struct("<4q")  # of a step: InputBatch.sizes
LOST = 3  # exit status of a rank that has lost another: not the cause
END_S = 5.0  # for a rank to end by itself


KVCapacity = tuple[int, int]  # what fits into a rank's memory: longest sequence, KV blocks


class Workers(Protocol):
    """The other ranks, for a ModelRunner on any rank. All ranks make the calls in this order."""

    collective: Collective

    def sync_kv_capacity(self, weights_digest: str, room: KVCapacity) -> KVCapacity:
        """The room that every rank has. Raises ModelError if they have not the same weights."""

    def share(self, size: int) -> Tensor:
        """``size`` bytes, the same memory on all ranks; zeros at first."""

    def ready(self) -> None:
        """Returns on the first rank when all ranks can take steps."""

    def close(self) -> None:
        """Ends what belongs to the ranks here."""


class WorkerGroup:
    """All ranks but the first, which is this process.

    The constructor starts them. Raises RequestError or ModelError as they do, EngineDeadError if
    one ends by itself.
    """

    def __init__(self, config: EngineConfig, path: Path) -> None:
        self.size = config.tensor_parallel_size
        self._threads = torch.get_num_threads()
        self._memory = SharedMemory()
        threads = max(self._threads // self.size, 1)
        if config.device == "cpu":
            torch.set_num_threads(threads)
        self._watch = _Watch(self.size, self._memory.fd, threads)
        self._end = weakref.finalize(self, self._watch.close)
        try:
            store = self._watch.store
            start = {
                "config": asdict(config),
                "path": str(path),
                "threads": threads,
                "store": store,
            }
            self._watch.tell(json.dumps(start).encode() + b"\n")
            self._collect()  # all are there, so connecting does not wait for one that has died
            self.collective = connect(Shard(0, self.size), config.device, self._memory, store)
            self._watch.collective = self.collective
        except BaseException:
            self.close()
            raise

    def sync_kv_capacity(self, weights_digest: str, room: KVCapacity) -> KVCapacity:
        """See Workers."""
        answers = self._collect()
        for rank, answer in answers.items():
            if answer["weights_digest"] != weights_digest:
                raise ModelError(
                    f"rank {rank} has loaded other weights than rank 0: the model's directory must "
                    "be the same for all, and must not change while they start"
                )
        lengths, blocks = zip(room, *(answer["room"] for answer in answers.values()), strict=True)
        least = min(lengths), min(blocks)
        self._watch.tell(json.dumps(least).encode() + b"\n")
        return least

    def share(self, size: int) -> Tensor:
        """See Workers."""
        return self._memory.take(size)

    def ready(self) -> None:
        """See Workers."""
        self._collect()

    def _collect(self) -> dict[int, Any]:
        """One answer of every other rank."""
        answers: dict[int, Any] = {}
        while len(answers) < self.size - 1:
            found = self._watch.answers.get()
            if found is None:
                raise self._watch.cause
            answers[found[0]] = found[1]
        return answers

    @contextlib.contextmanager
    def step(self, sizes: tuple[int, ...]) -> Iterator[None]:
        """Has the other ranks compute a step that stands in the shared memory, while its body
        computes this rank's part. A body that fails leaves ranks that cannot go on."""
        self.check()
        try:
            self._watch.tell(SIZES.pack(*sizes))
            yield
        except BaseException as error:
            lost = isinstance(error, RuntimeError | OSError) and self._watch.failed.wait(END_S)
            self._watch.fail(EngineDeadError("a step has failed, so the ranks of its engine ended"))
            self.close()
            if lost:
                raise self._watch.cause from error
            raise

    def check(self) -> None:
        """Raises EngineDeadError if a rank has died."""
        if self._watch.failed.is_set():
            raise self._watch.cause

    def close(self) -> None:
        """Ends the other ranks, and waits until they are gone."""
        if self._end.alive:
            self._end()
            self._memory.close()
            torch.set_num_threads(self._threads)

    @property
    def pids(self) -> list[int]:
        """Process ids of the other ranks, in order."""
        return [process.pid for process in self._watch.processes]


class _Watch:
    """The worker processes and their answers. Holds no reference to the WorkerGroup."""

    def __init__(self, size: int, memory: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="s1engine-")
        self.store = f"{self._folder.name}/store"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.answers: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self.failed = threading.Event()
        self.cause: Exception = EngineDeadError("the ranks of this engine have ended")
        self.collective: Collective | None = None
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._lost = 0
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

    def tell(self, data: bytes) -> None:
        """The same to all ranks."""
        for connection in self._sockets:
            connection.sendall(data)

    def _listen(self, rank: int) -> None:
        """Takes answers of a rank until it ends, and finds out why it has."""
        connection, process = self._sockets[rank - 1], self.processes[rank - 1]
        with contextlib.suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "error" in answer:
                    self.fail(_error(rank, answer))
                self.answers.put((rank, answer))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with self._lock:
            self._lost += process.returncode == LOST
            all_lost = self._lost == len(self.processes)
        if process.returncode != LOST or all_lost:  # else another rank's end is the cause
            self.fail(EngineDeadError(f"rank {rank} of the model {_fate(process.returncode)}"))

    def fail(self, cause: Exception) -> None:
        """Ends everything, unless it is ending already; the first cause counts."""
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
        """Lets all ranks end, and waits for them."""
        with self._lock:
            self._closing = True
            self.failed.set()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        for process in self.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:
            listener.join(END_S)
        for connection in self._sockets:
            connection.close()
        self._folder.cleanup()


def _error(rank: int, answer: dict[str, Any]) -> Exception:
    message = f"rank {rank}: {answer['error']}"
    match answer["kind"]:
        case "RequestError":
            return RequestError(message, param=answer["param"])
        case "ModelError":
            return ModelError(message)
    return EngineDeadError(message)


def _fate(status: int | None) -> str:
    if status is None:
        return "has closed its connection"
    return f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"


def connect(shard: Shard, device: str, memory: SharedMemory, store: str) -> Collective:
    """What the ranks of a model on that device add up with; all call this. ``store`` is the path of
    a file, empty at first."""
    if device == "cpu":
        return SharedCollective(shard, memory.take(SharedCollective.memory_bytes(shard.size)))
    return NcclCollective(shard, store)
