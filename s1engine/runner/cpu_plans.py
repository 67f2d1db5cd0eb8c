"""Decode steps on the CPU, recorded once for each number of rows and replayed without Python.

Owns the recordings. A step is a function from fixed buffers (InputBatch, weights, KV cache, the
workspace of CpuOps) to fixed buffers, so a list of kernel calls is all there is to it. Steps that
extend prompts come in endless sizes and have more to compute: they are done call by call.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from s1engine._core import cpu
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner.input_batch import StepInputs


@dataclass(frozen=True, slots=True)
class _Recording:
    plan: cpu.Plan
    inputs: StepInputs  # kept: these are the buffers
    logits: Tensor


class CpuPlans:
    """Recordings by (tokens, rows that sample)."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops
        self._workspace = ops.workspace
        self._generation = -1
        self._recordings: dict[tuple[int, int], _Recording] = {}

    def run(self, inputs: StepInputs, step: Callable[[StepInputs], Tensor]) -> Tensor:
        """``step(inputs)``, which must touch memory by the kernels alone; valid until the next."""
        if inputs.attention.max_seqlen_q > 1:
            with self._ops.reusing():
                return step(inputs)
        if self._generation != self._workspace.generation:
            self._recordings.clear()
            self._generation = self._workspace.generation
        sizes = inputs.input_ids.shape[0], inputs.sample_tokens.shape[0]
        recording = self._recordings.get(sizes)
        if recording is not None:
            recording.plan.replay()
            return recording.logits
        return self._record(sizes, inputs, step)

    def _record(
        self, sizes: tuple[int, int], inputs: StepInputs, step: Callable[[StepInputs], Tensor]
    ) -> Tensor:
        plan = cpu.Plan()
        cpu.record_into(plan)
        try:
            with self._ops.reusing():
                logits = step(inputs)
        finally:
            cpu.record_into(None)
        if self._generation == self._workspace.generation:  # else some addresses are old ones
            self._recordings[sizes] = _Recording(plan, inputs, logits)
        return logits
