"""Decode steps as graphs: a replay equals the eager step, whatever stands in its spare rows.

The graphs of this "GPU" are lists of calls with the tensors and numbers of the capture. A replay
repeats them, so a value that the capture read on the host is stale in every later step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.errors import ModelError
from s1engine.ops import AttentionMetadata
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.input_batch import InputBatch, StepInputs
from s1engine.runner.step_graph import Capture, StepGraphRunner
from s1engine.sampling_params import SamplingParams

MODEL = shape("nano")
CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_num_seqs=6, max_num_batched_tokens=16, block_size=16,
    max_model_len=96, kv_cache_memory_gb=0.01, max_step_ms=0, enable_prefix_caching=False,
)  # fmt: skip
GARBAGE = 10**6  # no block has this id
RULES = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, presence_penalty=0.5),
    SamplingParams(temperature=0.7, top_k=5, logprobs=2),
)


class Recorder(TorchDispatchMode):
    """Runs operations of torch, and notes them; all calls that change memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        outs = out if isinstance(out, tuple | list) else (out,)

        def call() -> None:
            again = func(*args, **kwargs)
            for old, new in zip(outs, again if outs is out else (again,), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(call)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty")):
            self.note(func, args, kwargs, out)
        return out


class GpuOps(TorchOps):
    """Attention is one launch, and leaves poison in idle rows."""

    recorder: Recorder | None = None

    def paged_attention(self, *args: Any) -> Tensor:
        recorder = self.recorder
        if recorder is None:
            return self._attention(*args)
        with torch.utils._python_dispatch._disable_current_modes():
            out = self._attention(*args)
        recorder.note(self._attention, args, {}, out)
        return out

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, meta: AttentionMetadata, *rest: Any
    ) -> Tensor:
        rows = int((meta.context_lens > 0).sum())
        tokens = int(meta.cu_seqlens_q[rows])
        out = torch.full_like(q, torch.nan).flatten(1)
        active = replace(meta, context_lens=meta.context_lens[:rows])
        if rows:
            out[:tokens] = super().paged_attention(q[:tokens], k, v, scale, active, *rest)
        return out


OPS = GpuOps()
DECODER = make_decoder(MODEL, CONFIG, OPS)


def capture(work: Callable[[], Tensor]) -> tuple[Recorder, Tensor]:
    OPS.recorder = recorder = Recorder()
    try:
        with recorder:
            return recorder, work()
    finally:
        OPS.recorder = None


def graph_engine(capture: Capture = capture) -> tuple[BareEngine, StepGraphRunner]:
    """Its null block and the block tables of spare rows hold poison."""
    engine = BareEngine(CONFIG, MODEL, DECODER)
    runner = engine.runner
    null_slot = runner.num_blocks * CONFIG.block_size
    graphs = StepGraphRunner(runner._eager_forward, runner.batch, null_slot)
    runner.batch.block_table.fill_(GARBAGE)
    for layer in runner.kv_cache.layers:
        for cache in layer:
            cache[-1] = torch.nan
    with torch.inference_mode():
        graphs.capture(capture, progress=False)
    runner._step_graphs = graphs
    return engine, graphs


def tokens(engine: BareEngine, jobs: list[tuple[int, int, int]]) -> list[list[int]]:
    """Of prompts of these lengths, so many tokens each, by these rules; one job comes a step."""
    names = []
    for i, (length, new, rule) in enumerate(jobs):
        prompt = [(7 * i + j * j) % 250 + 10 for j in range(length)]
        names.append(engine.add(Job(prompt=prompt, max_new=new, params=RULES[rule], seed=i)))
        engine.step()
    engine.run_jobs()
    return [engine.output_tokens(name) for name in names]


JOBS = st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(0, len(RULES) - 1))


@settings(max_examples=12)
@given(st.lists(JOBS, min_size=1, max_size=8))
def test_replays_give_the_tokens_of_eager_steps(jobs: list[tuple[int, int, int]]) -> None:
    engine, _ = graph_engine()
    assert tokens(engine, jobs) == tokens(BareEngine(CONFIG, MODEL, DECODER), jobs)


MIXED = [(30, 8, 0), (3, 6, 1), (20, 8, 2)]  # three rows decode: a bucket of four has a spare one


def test_steps_of_one_token_a_row_are_replayed_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, graphs = graph_engine()
    forward, eager, all_steps = engine.runner._forward, [], []

    def counting(inputs: StepInputs) -> Tensor:
        before = graphs.num_replays
        hidden = forward(inputs)
        all_steps.append(inputs)
        eager.extend([inputs] * (graphs.num_replays == before))
        return hidden

    monkeypatch.setattr(engine.runner, "_forward", counting)
    tokens(engine, MIXED)
    assert 0 < len(eager) < len(all_steps) == len(eager) + graphs.num_replays
    assert all(inputs.attention.max_seqlen_q > 1 for inputs in eager)


def test_spare_rows_that_are_not_written_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the first test would find: spare rows keep what steps before have left."""
    engine, _ = graph_engine()
    monkeypatch.setattr(InputBatch, "write_spare_rows", lambda self, *args: None)
    wanted = tokens(BareEngine(CONFIG, MODEL, DECODER), MIXED)
    try:
        found = tokens(engine, MIXED) != wanted
    except IndexError:  # a stale row reads the poisoned block table
        found = True
    assert found


def test_a_value_that_the_capture_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = BareEngine(CONFIG, MODEL, DECODER)
    forward = type(engine.runner)._eager_forward

    def reading(self: Any, inputs: StepInputs) -> Tensor:
        return forward(self, inputs).roll(int(inputs.input_ids[0]), dims=1)

    monkeypatch.setattr(type(engine.runner), "_eager_forward", reading)
    wanted = tokens(engine, MIXED)
    assert tokens(graph_engine()[0], MIXED) != wanted


def test_a_capture_that_fails_names_the_place_the_rows_and_the_flag() -> None:
    def fail(work: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(ModelError, match=r"a step of 6 sequences.*not permitted.*--enforce-eager"):
        graph_engine(fail)
