"""Ranges around the parts of a step, and traces of the first steps.

Owns what a profiler sees of the engine. Costs two lookups per range while no profiler is attached.
Knows no scheduler and no device.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch._C._autograd import _profiler_enabled

SKIPPED_STEPS = 8  # the first steps compile, record and fill caches
TRACED_STEPS = 64
_NO_RANGE = nullcontext()


def profile_range(name: str) -> AbstractContextManager[object]:
    """A named range of the calling thread, for torch's profiler if it records this thread, else for
    Nsight Systems if ``S1ENGINE_NVTX`` is 1."""
    if _profiler_enabled():
        return torch.profiler.record_function(name)
    if _uses_nvtx():
        return torch.cuda.nvtx.range(name)
    return _NO_RANGE


@cache
def _uses_nvtx() -> bool:
    return os.environ.get("S1ENGINE_NVTX") == "1" and torch.cuda.is_available()


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
