"""Ranges reach torch's profiler and cost nothing without one; a trace shows the parts of a step."""

import contextlib
import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from s1engine import LLM, SamplingParams
from s1engine.profiling import SKIPPED_STEPS, TRACED_STEPS, StepTracer, profiler_attached, ranged


def test_no_profiler_is_attached_by_itself() -> None:
    assert not profiler_attached()


def test_a_range_reaches_the_profiler() -> None:
    add = ranged("execute", torch.add)
    with torch.profiler.profile() as profiler:
        assert profiler_attached()
        assert add(torch.ones(1), 1).item() == 2
    assert "execute" in {event.key for event in profiler.key_averages()}


def test_a_trace_holds_the_steps_after_the_first(tmp_path: Path) -> None:
    tracer = StepTracer(tmp_path / "traces")
    for step in range(SKIPPED_STEPS + TRACED_STEPS + 5):
        ranged(f"step {step}", torch.ones)(1)
        tracer.end_step()
    tracer.close()
    names = {event.get("name") for event in read_trace(tracer.path)}
    seen = {f"step {i}" for i in range(SKIPPED_STEPS, SKIPPED_STEPS + TRACED_STEPS)}
    assert {name for name in names if str(name).startswith("step ")} == seen


@pytest.mark.parametrize("num_tokens", [SKIPPED_STEPS + 5, SKIPPED_STEPS + TRACED_STEPS + 5])
def test_an_engine_writes_the_parts_of_its_steps(tmp_path: Path, num_tokens: int) -> None:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
    with contextlib.closing(LLM(profile=str(tmp_path), progress=False)) as llm:
        llm.generate("a=3", params, progress=False)
    (path,) = tmp_path.iterdir()
    names = [event.get("name") for event in read_trace(path)]
    for name in ("schedule", "execute", "sample", "process"):
        assert names.count(name) == min(num_tokens - SKIPPED_STEPS, TRACED_STEPS)


def test_a_step_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
    with contextlib.closing(LLM(progress=False)) as llm:
        with caplog.at_level(logging.INFO, "s1engine"):
            llm.generate("a=3", params, progress=False)
        assert caplog.records == []
        with caplog.at_level(logging.DEBUG, "s1engine.engine.llm_engine"):
            llm.generate("a=3", params, progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("llm_engine")]
    assert len(lines) == 5 and all("0 waiting" in line for line in lines)


def read_trace(path: Path) -> list[dict[str, object]]:
    """The events of a trace file."""
    with gzip.open(path) as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events
