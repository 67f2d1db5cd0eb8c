"""Decode steps that the device takes by itself: the whole step as one CUDA graph, replayed K times.

A graph holds forward pass, logits, sampling, the thinking budget and the next step's inputs, for a
fixed number of lanes, so that the host has nothing to do between two steps. It launches a group of
steps, and reads the sampled ids of the group before while the device goes on. Batches are rounded
up to a bucket, whose further lanes have finished from the start.

Without CUDA the steps of a group are run one by one, from the same buffers: slower, same tokens.
Knows no sequence: what lanes mean is up to the scheduler.
"""

import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s1engine.errors import ModelError
from s1engine.ops import DeviceBatchTensors
from s1engine.ops.compile_ahead import compiled_ahead
from s1engine.runner.device_batch import DeviceBatchBuffer, DeviceBatchFormat

Step = Callable[[DeviceBatchTensors, bool], None]
DEPTH = 2  # groups of steps under way at once: one computes while the host reads the other
SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
BUCKET_STEP = 64  # beyond
MAX_DEVICE_ROWS = 1024  # that the step kernel covers; larger batches are stepped by the host


def buckets(max_num_seqs: int) -> list[int]:
    """Sizes of batches, ascending; the last holds ``max_num_seqs`` if a run can."""
    most = min(max_num_seqs, MAX_DEVICE_ROWS)
    sizes = [*SMALL_BUCKETS, *range(SMALL_BUCKETS[-1] + BUCKET_STEP, most, BUCKET_STEP)]
    return [size for size in sizes if size < most] + [most]


@dataclass(slots=True)
class _Flight:
    """A group of steps whose ids the host has not read."""

    tokens: Tensor  # [steps, rows] int32 on the host, pinned
    lanes: int  # that the scheduler knows of
    began: torch.cuda.Event | None
    landed: torch.cuda.Event | None


class CudaGraphRunner:
    """Runs of up to ``max_steps`` steps a launch.

    Args:
        step: one decode step of a state, whose lanes filter or do not; everything it launches
            must be capturable.
        max_num_seqs: largest batch.
        block_table: [max_num_seqs, max_blocks] int32 on the host, written by the scheduler.
        fmt: what all lanes share.
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
        self._lanes = {
            size: DeviceBatchBuffer(size, steps=max_steps, fmt=fmt, block_table=self._table[:size],
                        device=device)
            for size in sizes
        }  # fmt: skip
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        shape = (DEPTH, max_steps * sizes[-1])
        self._landing = torch.zeros(shape, dtype=torch.int32, pin_memory=on_device)
        self._flights: deque[_Flight] = deque()
        self._launches = 0
        self.device_seconds = 0.0
        """What the groups collected so far took on the device; 0 without CUDA."""
        self._current: tuple[DeviceBatchBuffer, int] | None = None  # of the run under way

    def lanes(self, num_seqs: int) -> DeviceBatchBuffer | None:
        """Buffers for so many sequences; None if no bucket holds them."""
        fits = [size for size in self._lanes if size >= num_seqs]
        return self._lanes[fits[0]] if fits else None

    def begin(self, lanes: DeviceBatchBuffer, num_seqs: int, steps: int) -> None:
        """Launches the first group of a run, whose lanes the scheduler has written."""
        assert not self._flights, "the run before must have landed"
        lanes.upload()
        self._current = lanes, num_seqs
        self.launch(steps)

    def launch(self, steps: int) -> None:
        """Enqueues ``steps`` more steps of the run; waits for nothing."""
        assert self._current is not None and len(self._flights) < DEPTH
        assert 0 < steps <= self.max_steps
        lanes, num_seqs = self._current
        state, on_device = lanes.state, self._table is not self._host_table
        began = _now() if on_device else None
        if on_device:  # only entries for later steps were added since the last copy
            self._table[:num_seqs].copy_(self._host_table[:num_seqs], non_blocking=True)
        state.step_counter.zero_()
        graph = self._graphs.get((lanes.rows, lanes.filtered))
        for _ in range(steps):
            graph.replay() if graph is not None else self._step(state, lanes.filtered)
        size = steps * lanes.rows
        tokens = self._landing[self._launches % DEPTH, :size].view(steps, lanes.rows)
        tokens.copy_(state.output_tokens[:steps], non_blocking=True)
        landed = _now() if on_device else None
        self._flights.append(_Flight(tokens, num_seqs, began, landed))
        self._launches += 1

    @property
    def in_flight(self) -> bool:
        """Are there groups to collect?"""
        return bool(self._flights)

    def collect(self) -> np.ndarray:
        """Waits for the oldest group. Returns its ids [steps, sequences] int32."""
        flight = self._flights.popleft()
        if flight.began is not None and flight.landed is not None:
            flight.landed.synchronize()
            self.device_seconds += flight.began.elapsed_time(flight.landed) / 1e3
        return np.ascontiguousarray(flight.tokens.numpy()[:, : flight.lanes])

    def capture(self, *, progress: bool) -> None:
        """Captures the step for every bucket, with filters and without, the largest first, so that
        all share one pool.

        Raises ModelError that names the kernel if a step cannot be run or captured.
        """
        sizes = sorted(self._lanes, reverse=True)
        with compiled_ahead(progress=progress):
            for size in sizes:
                self._guarded(size, self._take_steps)
        with tqdm(total=2 * len(sizes), desc="graphs", unit="pass", disable=not progress) as bar:
            for size in sizes:  # loads and allocates what must not happen while capturing
                self._guarded(size, self._take_steps)
                torch.cuda.synchronize()
                bar.update()
            pool = torch.cuda.graph_pool_handle()
            for size in sizes:
                self._guarded(size, lambda lanes: self._capture(lanes, pool))
                bar.update()

    def _guarded(self, size: int, work: Callable[[DeviceBatchBuffer], None]) -> None:
        try:
            work(self._lanes[size])
        except Exception as error:
            raise ModelError(
                f"no CUDA graph for {size} sequences, {_where(error)}: {error}; "
                "--enforce-eager runs without graphs"
            ) from error

    def _take_steps(self, lanes: DeviceBatchBuffer) -> None:
        for filtered in (False, True):
            self._step(lanes.state, filtered)

    def _capture(self, lanes: DeviceBatchBuffer, pool: Any) -> None:
        for filtered in (False, True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(lanes.state, filtered)
            self._graphs[lanes.rows, filtered] = graph


def _now() -> torch.cuda.Event:
    """An event at this place of the stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _where(error: BaseException) -> str:
    """The kernel that an error came from, or else the innermost function of ours."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    for part in ("kernels/", "s1engine/"):
        ours = [frame for frame in frames if part in frame.filename.replace("\\", "/")]
        if ours:
            return f"in {ours[-1].name} ({ours[-1].filename.rsplit('/', 1)[-1]})"
    return "while capturing"
