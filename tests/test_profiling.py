"""Ranges reach torch's profiler and cost nothing without one; a trace shows the parts of a step."""

import gzip
import json
from pathlib import Path

import torch

from s1engine.profiling import SKIPPED_STEPS, TRACED_STEPS, StepTracer, profile_range


def test_a_range_is_nothing_without_a_profiler() -> None:
    assert profile_range("execute") is profile_range("sample")


def test_a_range_reaches_the_profiler() -> None:
    with torch.profiler.profile() as profiler, profile_range("execute"):
        torch.ones(1) + 1
    assert "execute" in {event.key for event in profiler.key_averages()}


def test_a_trace_holds_the_steps_after_the_first(tmp_path: Path) -> None:
    tracer = StepTracer(tmp_path / "traces")
    for step in range(SKIPPED_STEPS + TRACED_STEPS + 5):
        with profile_range(f"step {step}"):
            torch.ones(1) + 1
        tracer.end_step()
    tracer.close()
    names = {event.get("name") for event in read_trace(tracer.path)}
    seen = {f"step {i}" for i in range(SKIPPED_STEPS, SKIPPED_STEPS + TRACED_STEPS)}
    assert {name for name in names if str(name).startswith("step ")} == seen


def read_trace(path: Path) -> list[dict[str, object]]:
    """The events of a trace file."""
    with gzip.open(path) as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events
