"""Decode steps on the CPU without Python (csrc/engine/decode_loop.hpp).

One native call plans, computes and samples a step, or several, and applies their tokens. It holds
the interpreter's lock at no time, so other threads of the process run meanwhile.
"""

import numpy as np

from s1engine import _core
from s1engine.runner.cpu_graph import CpuGraphRunner
from s1engine.runner.input_batch import InputBatch


class DecodeLoop:
    """Takes the steps of ``batch`` whose size ``graphs`` has recorded.

    Args:
        needs_python: by req_index, uint8: 1 for sequences that ``sampler`` alone does not sample.
    """

    def __init__(
        self,
        batch: InputBatch,
        graphs: CpuGraphRunner,
        sampler: _core.cpu.Sampler,
        needs_python: np.ndarray,
    ) -> None:
        self._graphs = graphs
        self._core = _core.DecodeLoop(batch.core, graphs.core, sampler, needs_python)

    def run(
        self,
        scheduler: _core.Scheduler,
        seconds: float,
        time_to_deadline: float,
        allowed_tokens: dict[int, np.ndarray],
    ) -> bytes | list[int]:
        """Takes decode steps until one reports something or has log-probabilities, ``seconds`` or
        the time to the next deadline have passed, or ``interrupt`` was called; at least one, and no
        more with ``allowed_tokens`` (see SchedulerOutput). Returns the records of the last step.

        Returns a list if the caller has to take the step that is planned now: the sequences that
        have entered it. Its plan may be empty."""
        self._graphs.drop_stale()
        return self._core.run(scheduler, seconds, time_to_deadline, allowed_tokens)

    @property
    def logprobs(self) -> bytes:
        """Log-probabilities of the last step that ``run`` computed (logprob_records.py)."""
        return self._core.logprobs

    def interrupt(self) -> None:
        """Ends the present ``run``, or the next one, after its step. Any thread may call it."""
        self._core.interrupt()
