"""CUDA graphs of single decode steps: the forward pass of every step of one token a row.

The host decides such a step, because a row has log-probabilities, penalties, a bias, bans or a
grammar. A graph reads the fixed addresses of InputBatch and serves all steps of up to so many rows:
the scheduler's rows come first, spare rows write to the null block and read nothing. Logits and
sampling follow eagerly: few launches, and no graph holds memory for logits.

Knows no sequence. Steps with prompt chunks or drafts have rows of several tokens and run eagerly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s1engine.errors import ModelError
from s1engine.progress import progress_bar
from s1engine.runner.cuda_graph import buckets, where
from s1engine.runner.input_batch import InputBatch, StepInputs, StepSizes


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Enqueues it."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


@dataclass(frozen=True, slots=True)
class _StepGraph:
    graph: Graph
    hidden: Tensor  # [rows, H], written by each replay


class StepGraphRunner:
    """Forward passes of decode steps over the buffers of ``batch``.

    Args:
        forward: hidden states [T, H] of a step. Everything it launches must be capturable.
        null_slot: where the tokens of spare rows go.

    Attributes:
        num_replays: so far.
    """

    def __init__(
        self, forward: Callable[[StepInputs], Tensor], batch: InputBatch, null_slot: int
    ) -> None:
        self._forward, self._batch, self._null_slot = forward, batch, null_slot
        most = min(len(batch.block_table), batch.max_tokens)
        self._sizes = buckets(most)
        self._graphs: dict[int, _StepGraph] = {}
        self.num_replays = 0

    def prepare(self, sizes: StepSizes) -> None:
        """Writes the spare rows of the step that is in the host side of the batch, if a graph takes
        it. Call it before the step is copied to the device."""
        rows = self._bucket(sizes.num_tokens, sizes.num_rows, sizes.max_seqlen_q)
        if rows is not None:
            self._batch.write_spare_rows(sizes.num_rows, rows, self._null_slot)

    def execute(self, inputs: StepInputs) -> Tensor | None:
        """Hidden states [T, H] of a prepared step, valid until the next call; None if no graph
        takes it."""
        meta = inputs.attention
        num_tokens = len(inputs.input_ids)
        rows = self._bucket(num_tokens, len(meta.context_lens), meta.max_seqlen_q)
        if rows is None:
            return None
        captured = self._graphs[rows]
        captured.graph.replay()
        self.num_replays += 1
        return captured.hidden[:num_tokens]

    def capture(self, capture: Capture, *, progress: bool) -> None:
        """Captures a graph for every bucket, the largest first, so that all share one pool.

        Raises ModelError that names the kernel and the bucket if a step cannot be run or captured.
        """
        sizes = sorted(self._sizes, reverse=True)
        with progress_bar(progress, total=len(sizes), desc="step graphs", unit="graph") as bar:
            for rows in sizes:
                try:
                    self._graphs[rows] = self._captured(rows, capture)
                except Exception as error:
                    raise ModelError(
                        f"no CUDA graph for a step of {rows} sequences, {where(error)}: {error}; "
                        "--enforce-eager runs without graphs"
                    ) from error
                bar.update()

    def _captured(self, rows: int, capture: Capture) -> _StepGraph:
        self._batch.wait_until_read()
        self._batch.write_spare_rows(0, rows, self._null_slot)
        inputs = self._batch.inputs(StepSizes(rows, rows, rows, 1))
        self._forward(inputs)  # compiles and allocates what must not happen during capture
        self._batch.wait_until_read()
        return _StepGraph(*capture(lambda: self._forward(inputs)))

    def _bucket(self, num_tokens: int, num_rows: int, max_seqlen_q: int) -> int | None:
        if max_seqlen_q != 1 or num_tokens != num_rows:
            return None
        return next((rows for rows in self._sizes if rows >= num_rows), None)


def cuda_capture(pool: Any) -> Capture:
    """Captures into ``pool``, on the current device."""

    def capture(work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may query its events meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = work()
        return graph, output

    return capture
