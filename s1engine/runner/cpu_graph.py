"""Decode steps on the CPU, recorded once for each size and replayed without Python.

Owns the recordings. A step is a function from fixed buffers (InputBatch, weights, KV cache, the
workspaces) to fixed buffers, so a list of kernel calls, sums over ranks among them, is all there is
to it. The kernels read where each row begins from these buffers, so one recording serves all steps
of so many tokens in so many rows, whichever of them have drafts. Steps that extend prompts come in
endless sizes and have more to compute: they are done call by call.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from s1engine._core import cpu
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.workspace import Workspace
from s1engine.runner.input_batch import StepInputs

MAX_GRAPHS = 1024  # some 30 KB each for a deep model; then the oldest goes


@dataclass(frozen=True, slots=True)
class _Recording:
    plan: cpu.RecordedStep
    inputs: StepInputs  # kept: these are the buffers
    logits: Tensor


class CpuGraphRunner:
    """Recordings by (tokens, rows).

    Args:
        others: workspaces that steps use beside that of ``ops``.

    Attributes:
        recorded_now: the last step was, which took longer than it will take again.
    """

    def __init__(self, ops: CpuOps, *others: Workspace) -> None:
        self._ops = ops
        self._workspaces = (ops.workspace, *others)
        self._generation = -1
        self._graphs: dict[tuple[int, int], _Recording] = {}
        self.recorded_now = False

    def execute(self, inputs: StepInputs, step: Callable[[StepInputs], Tensor]) -> Tensor:
        """``step(inputs)``, which must touch memory by the kernels alone; valid until the next."""
        sizes = inputs.input_ids.shape[0], inputs.attention.context_lens.shape[0]
        self.recorded_now = False
        if inputs.sample_tokens.shape[0] < sizes[0]:  # some token is a prompt's
            with self._ops.reusing():
                return step(inputs)
        if self._generation != self._moves():  # some recorded addresses are old ones
            self._graphs.clear()
            self._generation = self._moves()
        recording = self._graphs.get(sizes)
        if recording is not None:
            recording.plan.replay()
            return recording.logits
        return self._record(sizes, inputs, step)

    def _record(
        self, sizes: tuple[int, int], inputs: StepInputs, step: Callable[[StepInputs], Tensor]
    ) -> Tensor:
        self.recorded_now = True
        plan = cpu.RecordedStep()
        cpu.record_into(plan)
        try:
            with self._ops.reusing():
                logits = step(inputs)
        finally:
            cpu.record_into(None)
        if len(self._graphs) == MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[sizes] = _Recording(plan, inputs, logits)
        return logits

    def _moves(self) -> int:
        """Grows whenever a buffer of a workspace moves."""
        return sum(workspace.generation for workspace in self._workspaces)
