"""Steps on the CPU as lists of kernel calls: recorded by Python, then computed by one native call.

The twin of ``cuda_graph``. Owns the graphs: lists of kernel calls, all-reduces included. A step is
a function from fixed buffers (InputBatch, weights, KV cache, workspaces) to fixed buffers, and
kernels read the row boundaries from these buffers, so one graph serves all steps with as many
tokens in as many rows, with and without drafts. Graphs of decode steps are kept. Steps with prompt
tokens have too many sizes and enough work per call: each is recorded anew.

Python gives the interpreter's lock away once a step, not once a kernel: another thread that is busy
may keep it for 5 ms each time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s1engine._core import cpu
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.layouts import row_stride
from s1engine.ops.workspace import Workspace
from s1engine.runner.input_batch import StepInputs

MAX_GRAPHS = 1024  # about 30 KB each for a deep model; the oldest is dropped


@dataclass(frozen=True, slots=True)
class _CpuGraph:
    step: cpu.RecordedStep
    inputs: StepInputs  # keeps the buffers alive
    logits: Tensor


class _KernelsOnly(TorchDispatchMode):
    """Within it, torch may allocate and view tensors, but not compute."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiled code runs within it. True would import torch._dynamo, which takes seconds,
        in the first step that is recorded."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        allocates = func.__name__.startswith(("empty", "new_empty"))
        assert func.is_view or allocates, (
            f"{func} cannot be recorded: it needs a kernel in csrc/cpu"
        )
        return func(*args, **(kwargs or {}))


class CpuGraphRunner:
    """Graphs by (tokens, rows).

    Args:
        others: workspaces that steps use besides that of ``ops``.

    Attributes:
        core: the same graphs, for native code. ``drop_stale`` before each use.
        recorded_now: the last step was recorded, which takes longer than a replay.
    """

    def __init__(self, ops: CpuOps, *others: Workspace) -> None:
        self._ops = ops
        self._workspaces = (ops.workspace, *others)
        self._generation = -1
        self._graphs: dict[tuple[int, int], _CpuGraph] = {}
        self.core = cpu.GraphTable()
        self.recorded_now = False

    def execute(self, inputs: StepInputs, step: Callable[[StepInputs], Tensor]) -> Tensor:
        """Logits of ``step(inputs)``, valid until the next call. ``step`` must compute by kernels
        of ``csrc/cpu`` only: AssertionError names a torch operation that a replay would skip. It
        may be called twice."""
        sizes = inputs.input_ids.shape[0], inputs.attention.context_lens.shape[0]
        decodes = inputs.sample_tokens.shape[0] == sizes[0]  # else the step has prompt tokens
        self.drop_stale()
        graph = self._graphs.get(sizes) if decodes else None
        self.recorded_now = decodes and graph is None
        if graph is None:
            graph = self._record(inputs, step)
        if self.recorded_now:
            self._add(sizes, graph)
        graph.step.replay()
        return graph.logits

    def reserve(self, inputs: StepInputs, step: Callable[[StepInputs], Tensor]) -> None:
        """Grows the workspaces to what ``step(inputs)`` needs, computing nothing, so that later
        steps of this size leave the recorded ones valid."""
        self._record(inputs, step)

    def abandon(self) -> None:
        """Ends a recording that an exception has interrupted."""
        cpu.record_into(None)

    def drop_stale(self) -> None:
        """Drops all graphs if a workspace has moved: their addresses are stale."""
        if self._generation != self._workspace_generation():
            self._graphs.clear()
            self.core.clear()
            self._generation = self._workspace_generation()

    def _add(self, sizes: tuple[int, int], graph: _CpuGraph) -> None:
        self.drop_stale()
        if len(self._graphs) == MAX_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest]
            self.core.remove(*oldest)
        self._graphs[sizes] = graph
        self.core.add(*sizes, graph.step, graph.logits.data_ptr(), row_stride(graph.logits))

    def _record(self, inputs: StepInputs, step: Callable[[StepInputs], Tensor]) -> _CpuGraph:
        """The calls of ``step(inputs)``, none of them executed."""
        while True:
            generation = self._workspace_generation()
            recorded = cpu.RecordedStep()
            cpu.record_into(recorded)
            try:
                with self._ops.reusing(), _KernelsOnly():  # type: ignore[no-untyped-call]
                    logits = step(inputs)
            finally:
                cpu.record_into(None)
            if generation == self._workspace_generation():
                return _CpuGraph(recorded, inputs, logits)
            # A buffer has moved: earlier calls hold its old address.

    def _workspace_generation(self) -> int:
        """Increases when a buffer of any workspace moves."""
        return sum(workspace.generation for workspace in self._workspaces)
