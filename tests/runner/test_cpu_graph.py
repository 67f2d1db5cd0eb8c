"""Recorded steps: a replay equals the calls, also after buffers have moved."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from s1engine import _core
from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.models.decoder import Decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops.cpu_ops import CpuOps
from s1engine.runner import cpu_graph, step_profile
from s1engine.runner.cpu_graph import CpuGraphRunner
from s1engine.runner.input_batch import StepInputs
from s1engine.runner.model_runner import ModelRunner
from s1engine.sampling_params import SamplingParams

CONFIG = EngineConfig(device="cpu", dtype="float32", max_num_seqs=6, max_num_batched_tokens=32)
MODEL = shape("nano")
DECODER = make_decoder(MODEL, CONFIG)
PLAIN = SamplingParams(temperature=1.0)
LENGTHS = [(5, 9), (17, 4), (1, 12), (30, 7), (8, 8)]  # prompt, new tokens


def tokens(
    *, recorded: bool, model: ModelConfig = MODEL, decoder: Decoder = DECODER
) -> list[list[int]]:
    engine = BareEngine(CONFIG, model, decoder)
    graphs = engine.runner._cpu_graph
    assert isinstance(graphs, CpuGraphRunner)
    if not recorded:
        engine.runner._cpu_graph = None
    generator = torch.Generator().manual_seed(3)
    names = []
    for prompt, new in LENGTHS:
        ids = torch.randint(10, 300, (prompt,), generator=generator).tolist()
        names.append(engine.add(Job(prompt=ids, max_new=new, params=PLAIN, seed=prompt)))
        engine.step()  # so that batches of every size decode, the smallest first
    engine.run_jobs()
    return [engine.output_tokens(name) for name in names]


def test_replayed_steps_give_the_same_tokens() -> None:
    assert tokens(recorded=True) == tokens(recorded=False)


def test_enforce_eager_records_no_steps() -> None:
    engine = BareEngine(replace(CONFIG, enforce_eager=True), MODEL, DECODER)
    assert engine.runner._cpu_graph is None


def test_a_torch_operation_in_a_recorded_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would skip it."""
    attention = CpuOps.paged_attention
    monkeypatch.setattr(
        CpuOps, "paged_attention", lambda self, *args: torch.tanh(attention(self, *args))
    )
    engine = BareEngine(CONFIG, MODEL, DECODER)
    engine.add(Job(prompt=[10, 11, 12], max_new=3))
    with pytest.raises(AssertionError, match=r"aten\.tanh.* needs a kernel in csrc/cpu"):
        engine.run_jobs()


def test_replayed_steps_with_qk_norm_give_the_same_tokens() -> None:
    model = replace(MODEL, qk_norm=True)
    decoder = make_decoder(model, CONFIG)
    assert tokens(recorded=True, model=model, decoder=decoder) == tokens(
        recorded=False, model=model, decoder=decoder
    )


def test_a_graph_serves_drafts_of_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers of tokens and rows, with different row boundaries."""
    monkeypatch.setattr(ModelRunner, "profile_step_costs", lambda self: [])
    config = replace(CONFIG, num_speculative_tokens=3)
    outputs = []
    for recorded in (True, False):
        engine = BareEngine(config, MODEL, DECODER)
        assert isinstance(engine.runner._cpu_graph, CpuGraphRunner)
        if not recorded:
            engine.runner._cpu_graph = None
        generator = torch.Generator().manual_seed(1)
        names, shapes = [], set()
        for _ in range(5):
            ids = (20 + torch.randint(0, 3, (24,), generator=generator)).tolist()
            names.append(engine.add(Job(prompt=ids, max_new=40)))
        while engine.scheduler.has_unfinished():
            engine.step()
            core = engine.runner.batch.core
            starts = engine.runner.batch.inputs().attention.cu_seqlens_q
            if core.num_samples == core.num_tokens:
                shapes.add((core.num_tokens, core.num_rows, tuple(starts.tolist())))
        assert len({shape[:2] for shape in shapes}) < len(shapes)
        outputs.append([engine.output_tokens(name) for name in names])
    assert outputs[0] == outputs[1]


def test_the_oldest_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_graph, "MAX_GRAPHS", 2)
    assert tokens(recorded=True) == tokens(recorded=False)
    engine = BareEngine(CONFIG, MODEL, DECODER)
    for _, new in LENGTHS:
        engine.add(Job(prompt=[5, 6], max_new=new))
    engine.run_jobs()
    assert isinstance(engine.runner._cpu_graph, CpuGraphRunner)
    assert len(engine.runner._cpu_graph._graphs) == 2


def test_costs_are_measured_on_recorded_steps_without_side_effects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_profile, "ENOUGH", math.inf)  # all sizes, whatever their time
    config = replace(CONFIG, num_speculative_tokens=3)
    engine = BareEngine(config, MODEL, DECODER)  # measures the step costs
    graphs = engine.runner._cpu_graph
    assert isinstance(graphs, CpuGraphRunner) and (24, 6) in graphs._graphs  # the largest
    plain = BareEngine(CONFIG, MODEL, DECODER)
    for one in (engine, plain):
        one.add(Job(prompt=[5, 6, 7, 8, 9], max_new=40))
        one.run_jobs()
    assert engine.output_tokens(0) == plain.output_tokens(0)


def test_a_size_is_recorded_once_and_again_when_memory_has_moved() -> None:
    ops = CpuOps()
    graphs = CpuGraphRunner(ops)
    ids, calls = torch.tensor([1, 2], dtype=torch.int32), 0
    table = torch.randn(4, 8)

    def step(inputs: StepInputs) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ops.gather_rows(table, inputs.input_ids)

    class Attention:
        context_lens = ids

    inputs = StepInputs(ids, Attention(), ids, None)  # type: ignore[arg-type]
    for _ in range(4):
        assert torch.equal(graphs.execute(inputs, step), table[ids.long()])
    assert calls == 2  # the first call grew the workspace, the second was recorded
    ids[0] = 3
    assert torch.equal(graphs.execute(inputs, step), table[[3, 2]]) and calls == 2
    ops.workspace.get("elsewhere", 1, 10**5, torch.float32)
    graphs.execute(inputs, step)
    graphs.execute(inputs, step)
    assert calls == 3


def test_recording_ends() -> None:
    ops = CpuOps()
    step = _core.cpu.RecordedStep()
    _core.cpu.record_into(step)
    ops.gather_rows(torch.ones(2, 2), torch.zeros(1, dtype=torch.int32))
    _core.cpu.record_into(None)
    ops.gather_rows(torch.ones(2, 2), torch.zeros(1, dtype=torch.int32))
    assert len(step) == 1


def test_only_the_first_step_of_a_size_is_recorded_and_its_time_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recording takes longer than a replay."""
    monkeypatch.setattr(
        ModelRunner, "profile_step_costs", lambda self: []
    )  # which would record steps
    config = replace(CONFIG, num_speculative_tokens=3)
    engine = BareEngine(config, MODEL, DECODER)
    graphs = engine.runner._cpu_graph
    assert isinstance(graphs, CpuGraphRunner)
    record_flags: list[bool] = []

    class SchedulerSpy:
        def __init__(self, scheduler: _core.Scheduler) -> None:
            self.scheduler = scheduler

        def __getattr__(self, name: str) -> Any:
            return getattr(self.scheduler, name)

        def record_step_time(self, seconds: float) -> None:
            record_flags.append(graphs.recorded_now)

    engine.scheduler = SchedulerSpy(engine.scheduler)  # type: ignore[assignment]
    recorded = []
    for rows in (1, 2, 2, 1):
        for _ in range(rows):
            engine.add(Job(prompt=[5, 6], max_new=4))
        while engine.scheduler.has_unfinished():
            engine.step()
            recorded.append(graphs.recorded_now)
    assert len(record_flags) == recorded.count(False) and not any(record_flags)
    assert 2 <= recorded.count(True) <= len(graphs._graphs)
