"""Multi-step decode on the device: a whole decode step is one CUDA graph, replayed K times.

A captured graph holds forward pass, logits, sampling, the thinking budget and the next step's
inputs, for a fixed number of rows, so the host has nothing to do between two steps. The host
launches K steps, and reads the sampled ids of the launch before while the device computes. Batches
are rounded up to a bucket; its spare rows count as finished.

Without CUDA the steps of a launch run one by one, from the same buffers: slower, same tokens.
Knows no sequence: what a row means is the scheduler's business.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1engine.errors import ModelError
from s1engine.ops import DeviceBatchTensors
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.progress import progress_bar
from s1engine.runner.device_batch import DeviceBatchBuffer, DeviceBatchFormat

Step = Callable[[DeviceBatchTensors, bool], None]
MAX_LAUNCHES = 2  # in flight: the device computes one while the host reads the other
SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
BUCKET_STEP = 64  # beyond
MAX_DEVICE_ROWS = 1024  # covered by the step kernel; larger batches decode in single steps


def buckets(max_num_seqs: int) -> list[int]:
    """Sizes of batches, ascending. The last covers ``max_num_seqs``, up to MAX_DEVICE_ROWS."""
    largest = min(max_num_seqs, MAX_DEVICE_ROWS)
    sizes = [*SMALL_BUCKETS, *range(SMALL_BUCKETS[-1] + BUCKET_STEP, largest, BUCKET_STEP)]
    return [size for size in sizes if size < largest] + [largest]


@dataclass(slots=True)
class _Launch:
    """Steps whose ids the host has not read. ``begin`` and ``end`` are events on the device;
    without CUDA the steps are computed already, in ``seconds``."""

    tokens: Tensor  # [steps, rows] int32 on the host, pinned
    num_seqs: int  # rows that the scheduler knows of
    begin: torch.cuda.Event | None
    end: torch.cuda.Event | None
    seconds: float


class CudaGraphRunner:
    """Multi-step decodes of up to ``max_steps`` steps a launch.

    Args:
        step: one decode step of a device batch, with filters or without. Everything it launches
            must be capturable.
        max_num_seqs: largest batch.
        block_table: [max_num_seqs, max_blocks] int32 on the host, written by the scheduler.
        fmt: what all rows share.

    Attributes:
        device_seconds: what the collected launches took.
        num_launches: so far.
        pool: memory of all graphs; None without CUDA.
    """

    def __init__(
        self, step: Step, *, max_steps: int, max_num_seqs: int, block_table: Tensor,
        fmt: DeviceBatchFormat, device: str,
    ) -> None:  # fmt: skip
        sizes = buckets(max_num_seqs)
        self.max_steps = max_steps
        self._step = step
        self._host_table = block_table
        on_device = device != "cpu"
        self._table = torch.zeros_like(block_table, device=device) if on_device else block_table
        ends = fmt.end_tensors(device)
        self._buffers = {
            size: DeviceBatchBuffer(size, steps=max_steps, fmt=fmt,
                                    block_table=self._table[:size], device=device, ends=ends)
            for size in sizes
        }  # fmt: skip
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        shape = (MAX_LAUNCHES, max_steps * sizes[-1])
        self._host_tokens = torch.zeros(shape, dtype=torch.int32, pin_memory=on_device)
        self._launches: deque[_Launch] = deque()
        self.num_launches = 0
        self.pool = torch.cuda.graph_pool_handle() if on_device else None
        self.device_seconds = 0.0
        self._current: tuple[DeviceBatchBuffer, int] | None = None  # and its sequences

    def buffer(self, num_seqs: int) -> DeviceBatchBuffer | None:
        """The device batch for so many sequences; None if no bucket covers them."""
        sizes = [size for size in self._buffers if size >= num_seqs]
        return self._buffers[sizes[0]] if sizes else None

    def begin(self, buffer: DeviceBatchBuffer, num_seqs: int, steps: int) -> None:
        """Launches the first steps of a device batch that the scheduler has written."""
        self.set_rows(buffer, num_seqs)
        self.launch(steps)

    def set_rows(self, buffer: DeviceBatchBuffer, num_seqs: int) -> None:
        """The rows of the next launches, from the host side of ``buffer``."""
        assert not self._launches, "the multi-step decode before must be collected"
        buffer.upload()
        self._current = buffer, num_seqs

    def launch(self, steps: int) -> None:
        """Enqueues ``steps`` more steps of the current device batch; waits for nothing."""
        assert self._current is not None and len(self._launches) < MAX_LAUNCHES
        buffer, num_seqs = self._current
        state, on_device = buffer.state, self._on_device
        begin, host_begin = _record_event() if on_device else None, time.perf_counter()
        self._enqueue(steps)
        size = steps * buffer.rows
        tokens = self._host_tokens[self.num_launches % MAX_LAUNCHES, :size]
        tokens = tokens.view(steps, buffer.rows)
        tokens.copy_(state.output_tokens[:steps], non_blocking=True)
        end = _record_event() if on_device else None
        seconds = time.perf_counter() - host_begin
        self._launches.append(_Launch(tokens, num_seqs, begin, end, seconds))
        self.num_launches += 1

    def follow(self, steps: int) -> None:
        """``launch`` on a rank whose tokens the host does not read. Returns when the device has
        read the rows and the block table, maybe before it computes the steps."""
        read = self._enqueue(steps)
        if read is not None:
            read.synchronize()

    def _enqueue(self, steps: int) -> torch.cuda.Event | None:
        """Enqueues the steps. Returns an event behind all reads of host memory; None on the CPU."""
        assert self._current is not None and 0 < steps <= self.max_steps
        buffer, num_seqs = self._current
        state, read = buffer.state, None
        if self._on_device:  # only entries for later steps were added since the last copy
            self._table[:num_seqs].copy_(self._host_table[:num_seqs], non_blocking=True)
            read = _record_event()
        state.step_counter.zero_()
        graph = self._graphs.get((buffer.rows, buffer.filtered))
        for _ in range(steps):
            graph.replay() if graph is not None else self._step(state, buffer.filtered)
        return read

    @property
    def _on_device(self) -> bool:
        return self._table is not self._host_table

    @property
    def in_flight(self) -> bool:
        """Are there launches to collect?"""
        return bool(self._launches)

    def collect(self) -> tuple[np.ndarray, float]:
        """Waits for the oldest launch. Returns its ids [steps, sequences] int32, and the seconds
        that it took on the device."""
        launch = self._launches.popleft()
        seconds = launch.seconds
        if launch.begin is not None and launch.end is not None:
            launch.end.synchronize()
            seconds = launch.begin.elapsed_time(launch.end) / 1e3
        self.device_seconds += seconds
        return np.ascontiguousarray(launch.tokens.numpy()[:, : launch.num_seqs]), seconds

    def abandon(self) -> None:
        """Waits for all launches, and drops their tokens."""
        if self._on_device:
            torch.cuda.synchronize()
        self._launches.clear()

    @property
    def largest(self) -> DeviceBatchBuffer:
        """The buffers of the largest bucket."""
        return self._buffers[max(self._buffers)]

    def capture(self, *, progress: bool) -> None:
        """Captures the step for every bucket, with filters and without, the largest first, so that
        all graphs share one memory pool.

        Raises ModelError that names the kernel if a step cannot be run or captured.
        """
        sizes = sorted(self._buffers, reverse=True)
        with compiled_ahead(progress=progress):
            for size in sizes:
                self._guarded(size, self._dummy_run)
        with progress_bar(progress, total=2 * len(sizes), desc="graphs", unit="pass") as bar:
            for size in sizes:  # loads and allocates what must not happen during capture
                self._guarded(size, self._dummy_run)
                torch.cuda.synchronize()
                bar.update()
            for size in sizes:
                self._guarded(size, lambda buffer: self._capture(buffer, self.pool))
                bar.update()

    def _guarded(self, size: int, work: Callable[[DeviceBatchBuffer], None]) -> None:
        try:
            work(self._buffers[size])
        except Exception as error:
            raise ModelError(
                f"no CUDA graph for {size} sequences, {where(error)}: {error}; "
                "--enforce-eager runs without graphs"
            ) from error

    def _dummy_run(self, buffer: DeviceBatchBuffer) -> None:
        for filtered in (False, True):
            self._step(buffer.state, filtered)

    def _capture(self, buffer: DeviceBatchBuffer, pool: Any) -> None:
        for filtered in (False, True):
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog, another thread, may query its events meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step(buffer.state, filtered)
            self._graphs[buffer.rows, filtered] = graph


def _record_event() -> torch.cuda.Event:
    """An event at this place of the stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def where(error: BaseException) -> str:
    """The kernel that raised an error, or else the innermost function of this package."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    for part in ("kernels/", "s1engine/"):
        ours = [frame for frame in frames if part in frame.filename.replace("\\", "/")]
        if ours:
            return f"in {ours[-1].name} ({ours[-1].filename.rsplit('/', 1)[-1]})"
    return "while capturing"
