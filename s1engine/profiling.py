"""Ranges around the parts of a step, and traces of the first steps.

Owns what a profiler sees of the engine. A part of a step has two forms, plain and within a range,
and ``profiler_attached`` chooses once per step: without a profiler, ranges cost nothing. Knows no
scheduler and no device.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

SKIPPED_STEPS = 8  # the first steps compile, record and fill caches
TRACED_STEPS = 64
USES_NVTX = os.environ.get("S1ENGINE_NVTX") == "1"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def profiler_attached() -> bool:
    """True while torch's profiler records the calling thread, or if ``S1ENGINE_NVTX`` is 1."""
    return USES_NVTX or _profiler_enabled()


def ranged(name: str, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``function`` within a range ``name``, for calls while ``profiler_attached()``."""

    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        nvtx = USES_NVTX and torch.cuda.is_available()
        with torch.cuda.nvtx.range(name) if nvtx else nullcontext(), record_function(name):
            return function(*args, **kwargs)

    return call


class StepTracer:
    """Records TRACED_STEPS steps after the first SKIPPED_STEPS with torch's profiler, then writes
    one trace, ``s1engine-PID.json.gz``, for chrome://tracing or Perfetto.

    All calls come from the thread that steps.

    Args:
        directory: where the trace goes; it is created.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / f"s1engine-{os.getpid()}.json.gz"
        self._profiler: torch.profiler.profile | None = None
        self._num_steps = 0

    def end_step(self) -> None:
        """Counts a step; starts or ends the recording where the count says so."""
        self._num_steps += 1
        if self._num_steps == SKIPPED_STEPS:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._num_steps == SKIPPED_STEPS + TRACED_STEPS:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded; does nothing if nothing is being recorded."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))
