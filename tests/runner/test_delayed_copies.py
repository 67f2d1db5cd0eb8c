"""A device that is behind the host: copies and steps run late, in the order of their stream."""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s1engine.bench.bare_engine import BareEngine, Job, make_decoder
from s1engine.bench.shapes import shape
from s1engine.config import EngineConfig
from s1engine.ops.torch_ops import TorchOps
from s1engine.runner.input_batch import StepInputs
from s1engine.runner.rank_commands import CommandsRead
from s1engine.runner.staging_buffer import StagingBuffer

MODEL = shape("nano")
CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_num_seqs=3, max_num_batched_tokens=16, block_size=16,
    max_model_len=96, kv_cache_memory_gb=0.01, max_step_ms=0, enable_prefix_caching=False,
)  # fmt: skip
DECODER = make_decoder(MODEL, CONFIG, TorchOps())


class Stream:
    """Work that has been launched. ``progress()`` says how much of it runs after each launch."""

    def __init__(self, progress: Callable[[], int]) -> None:
        self._progress = progress
        self._pending: deque[tuple[bool, Callable[[], object]]] = deque()

    def launch(self, work: Callable[[], object], *, copies: bool = False) -> None:
        self._pending.append((copies, work))
        for _ in range(min(self._progress(), len(self._pending))):
            self._pending.popleft()[1]()

    def synchronize(self) -> None:
        while self._pending:
            self._pending.popleft()[1]()

    def wait_for_copies(self) -> None:
        """As an event behind the last copy: what was launched after it may still be pending."""
        while any(copies for copies, _ in self._pending):
            self._pending.popleft()[1]()


class DelayedStaging(StagingBuffer):
    """The "device" has memory of its own."""

    def __init__(self, host: Tensor, stream: Stream) -> None:
        super().__init__(host, "cpu")
        self.device = torch.zeros_like(host)
        self._stream = stream

    def upload(self, nbytes: int) -> None:
        device, host = self.device, self.host
        self._stream.launch(lambda: device[:nbytes].copy_(host[:nbytes]), copies=True)

    def wait(self) -> None:
        self._stream.wait_for_copies()


def delayed_engine(progress: Callable[[], int]) -> BareEngine:
    """An engine whose steps wait for the device only where they read a sample."""
    stream = Stream(progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "s1engine.runner.input_batch.StagingBuffer",
            lambda host, device: DelayedStaging(host, stream),
        )
        engine = BareEngine(CONFIG, MODEL, DECODER)
    compute = engine.runner._compute

    def launch(inputs: StepInputs, num_prompt_logprobs: int = 0) -> tuple[Tensor, Any]:
        if len(inputs.rows.req_indices) == 0:
            stream.launch(lambda: compute(inputs))
            return torch.empty(0, MODEL.vocab_size), None
        stream.synchronize()
        return compute(inputs, num_prompt_logprobs)

    engine.runner._compute = launch  # type: ignore[method-assign]
    return engine


def results(engine: BareEngine, lengths: list[tuple[int, int]]) -> tuple[list[list[int]], bytes]:
    """Of prompts of these lengths, each so many tokens, and what all steps wrote to the cache."""
    jobs = [
        engine.add(Job(prompt=[(7 * i + j * j) % 250 + 10 for j in range(length)], max_new=new))
        for i, (length, new) in enumerate(lengths)
    ]
    engine.run_jobs()
    written = b"".join(
        tensor.numpy().tobytes() for layer in engine.runner.kv_cache.layers for tensor in layer
    )
    return [engine.output_tokens(job) for job in jobs], written


@settings(max_examples=10)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 4)), min_size=1, max_size=4),
    data=st.data(),
)
def test_late_copies_change_no_token(lengths: list[tuple[int, int]], data: st.DataObject) -> None:
    engine = delayed_engine(lambda: data.draw(st.integers(0, 3)))
    assert results(engine, lengths) == results(BareEngine(CONFIG, MODEL, DECODER), lengths)


def test_without_waiting_a_long_prompt_is_computed_from_other_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault that the test above would find: a step overwrites one that was not copied."""
    monkeypatch.setattr(DelayedStaging, "wait", lambda self: None)
    lengths = [(80, 4)]
    wanted = results(BareEngine(CONFIG, MODEL, DECODER), lengths)
    assert results(delayed_engine(lambda: 0), lengths) != wanted


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 5))
def test_a_command_is_read_when_all_workers_have_read_it(ranks: list[int], commands: int) -> None:
    read = CommandsRead(torch.zeros(CommandsRead.memory_bytes(3), dtype=torch.uint8))
    for rank in ranks:
        read.count(rank)
    assert read.reached(commands) == (min(ranks.count(1), ranks.count(2)) >= commands)
