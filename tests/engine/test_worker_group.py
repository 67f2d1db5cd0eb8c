"""A model shared by two processes gives the same outputs, and its processes end together."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.model_config import ModelConfig
from s1engine.models.shard import Shard
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.rank_commands import CommandKind, RankCommand
from s1engine.runner.resolved_config import RUN_AHEAD, resolve_config
from s1engine.sampling_params import SamplingParams, ThinkingBudget

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="ranks need Linux")

QUESTIONS = ["a=3 b=a+4 c=b*2 c?", "a=3 b=a+4 c=b*2 b?", "q=1 w=q*7 e=w-5 e?", "x=2 x?"]
LONGEST = 160  # tokens of a sequence; the cache holds one and a half
ENDLESS = SamplingParams(temperature=1, seed=3, max_tokens=1500, ignore_eos=True)


def runner_of(llm: LLM) -> ModelRunner:
    assert isinstance(llm.engine.runner, ModelRunner)
    return llm.engine.runner


def pids_of(llm: LLM) -> list[int]:
    ranks = runner_of(llm)._worker_group
    assert ranks is not None
    return [process.pid for process in ranks._processes.processes]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module", params=[1, 5])
def pair(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two ranks with little memory and few tokens a step: they chunk, preempt and evict. Single
    steps, or multi-step decode on both ranks."""
    half = Shard(0, 2).config(ModelConfig.from_dir(BUNDLED_MODEL))
    token_bytes = half.kv_bytes_per_token(torch.float32)
    llm = LLM(
        progress=False,
        dtype="float32",
        tensor_parallel_size=2,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=LONGEST,
        kv_cache_memory_gb=1.5 * LONGEST * token_bytes / 2**30,
        run_ahead=request.param,
    )
    (pid,) = pids_of(llm)
    ranks = runner_of(llm)._worker_group
    yield llm
    llm.close()
    assert ranks is not None and [p.returncode for p in ranks._processes.processes] == [0]
    assert is_gone(pid)
    with pytest.raises(EngineDeadError):
        llm.chat([{"role": "user", "content": "x=2 x?"}], progress=False)


@st.composite
def asked(draw: st.DrawFn) -> SamplingParams:
    budget = ThinkingBudget(
        max_tokens=draw(st.none() | st.integers(0, 20)),
        num_waits=draw(st.integers(0, 2)),
        answer_reserve=4,
    )
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.9])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
        seed=draw(st.integers(0, 9)),
        n=draw(st.integers(1, 2)),
        prompt_logprobs=draw(st.sampled_from([None, 1])),
        max_tokens=draw(st.integers(24, 40)),
        thinking=draw(st.sampled_from([budget, None])),
    )


@settings(max_examples=4)
@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), asked()), min_size=2, max_size=4))
def test_outputs_are_those_of_one_rank(
    llm: LLM, pair: LLM, asked: list[tuple[str, SamplingParams]]
) -> None:
    chats = [[{"role": "user", "content": question}] for question, _ in asked]
    params = [p for _, p in asked]
    got = pair.chat(chats, params, progress=False)
    for one, found, wanted in zip(
        params, got, llm.chat(chats, params, progress=False), strict=True
    ):
        assert found.outputs == wanted.outputs, one
        ours, theirs = found.prompt_logprobs or (), wanted.prompt_logprobs or ()
        assert [s.logprob for s in ours if s] == pytest.approx(
            [s.logprob for s in theirs if s], abs=1e-4
        )
        assert len(ours) == len(theirs)
    pair.engine.scheduler.check_integrity()
    stats = pair.engine.scheduler.stats()
    assert stats.num_free_blocks == runner_of(pair).num_blocks
    graphs = runner_of(pair).multi_step
    assert graphs is None or graphs.num_launches > 0


def test_outputs_are_those_of_one_rank_where_memory_is_short(llm: LLM, pair: LLM) -> None:
    """The second time with log-probabilities, which need single steps."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    before = pair.engine.scheduler.stats()
    for logprobs in (None, 2):
        params = [
            SamplingParams(temperature=t, seed=i, max_tokens=70, ignore_eos=True, logprobs=logprobs)
            for i, t in enumerate((0.0, 0.8, 1.0, 0.0))
        ]
        got = pair.chat(chats, params, progress=False)
        after = pair.engine.scheduler.stats()
        assert after.num_preemptions > before.num_preemptions
        assert after.prefix_hits > before.prefix_hits
        for found, wanted in zip(got, llm.chat(chats, params, progress=False), strict=True):
            assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
            ours, theirs = found.outputs[0].logprobs or (), wanted.outputs[0].logprobs or ()
            assert len(ours) == len(theirs) == (70 if logprobs else 0)
            assert [p.logprob for p in ours] == pytest.approx([p.logprob for p in theirs], abs=1e-4)


def test_a_rank_has_half_of_the_cache(pair: LLM) -> None:
    runner, whole = runner_of(pair), ModelConfig.from_dir(BUNDLED_MODEL)
    assert runner.num_blocks == LONGEST * 3 // 2 // runner.kv_cache.block_size
    assert runner.kv_cache.layers[0][0].shape[1] == whole.num_kv_heads // 2


def kill_in_a_launch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1, when rank 0 is about to launch steps for the second time."""
    (pid,), graphs = pids_of(llm), runner_of(llm).multi_step
    assert graphs is not None
    launch = graphs.launch

    def launch_or_kill(steps: int) -> None:
        if graphs.num_launches == 1:
            os.kill(pid, signal.SIGKILL)
        launch(steps)

    monkeypatch.setattr(graphs, "launch", launch_or_kill)


def fail_on_rank_1(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch has 0 steps, while rank 0 computes some."""
    pack = RankCommand.pack
    zero = RankCommand(CommandKind.EXTEND, (0,))

    def wrong(command: RankCommand) -> bytes:
        return pack(zero if command.kind == CommandKind.EXTEND else command)

    monkeypatch.setattr(RankCommand, "pack", wrong)


def fail_on_rank_0(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second layer of a step, while rank 1 waits for its part of an all-reduce."""
    ops, calls = runner_of(llm).ops, iter(range(1000))
    attention = ops.paged_attention

    def fail(*args: object) -> object:
        if next(calls) == 9:
            raise ValueError("no attention")
        return attention(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "paged_attention", fail)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (kill_in_a_launch, r"^rank 1 of the model was killed by signal 9$"),
        (fail_on_rank_1, r"^rank 1: AssertionError$"),
        (fail_on_rank_0, r"^the engine has failed: ValueError\(.no attention.\)$"),
    ],
)
def test_a_rank_that_fails_in_a_step_ends_the_engine_with_one_error(
    fault: Callable[[LLM, pytest.MonkeyPatch], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM(progress=False, dtype="float32", tensor_parallel_size=2, run_ahead=4)
    (pid,) = pids_of(llm)
    fault(llm, monkeypatch)
    with pytest.raises(EngineDeadError, match=message):
        llm.chat([{"role": "user", "content": "x=2 x?"}], ENDLESS, progress=False)
    assert is_gone(pid)
    with pytest.raises(EngineDeadError):
        llm.chat([{"role": "user", "content": "x=2 x?"}], ENDLESS)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_rank_that_dies_while_idle_ends_the_engine() -> None:
    async def main() -> None:
        engine = ProcessEngineClient(EngineConfig(dtype="float32", tensor_parallel_size=2))
        await engine.start()
        try:
            request = engine.compiler.compile("x=2 x?", SamplingParams(max_tokens=2))
            async with contextlib.aclosing(engine.generate_request(request)) as events:
                assert [event async for event in events]
            (rank,) = children(engine.pid)
            ended = asyncio.Event()
            engine.on_failure = ended.set
            os.kill(rank, signal.SIGKILL)
            await asyncio.wait_for(ended.wait(), 30)
            assert str(engine.failure) == (
                "the engine failed: rank 1 of the model was killed by signal 9"
            )
            assert is_gone(rank)
        finally:
            await engine.shutdown()
        assert is_gone(engine.pid)

    asyncio.run(main())


def test_ranks_with_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "weights_digest", lambda self: "others")
    threads = torch.get_num_threads()
    with pytest.raises(ModelError, match=r"^rank 1 has loaded other weights than rank 0"):
        LLM(progress=False, dtype="float32", tensor_parallel_size=2)
    assert torch.get_num_threads() == threads


def test_wrong_sizes_are_refused_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**options: object) -> RequestError:
        with pytest.raises(RequestError) as caught:
            LLM(progress=False, **options)
        return caught.value

    monkeypatch.setattr("subprocess.Popen", None)
    assert refuse(tensor_parallel_size=0).param == "tensor_parallel_size"
    assert "use one of 1, 2, 4" in str(refuse(tensor_parallel_size=3))
    drafts = refuse(tensor_parallel_size=2, num_speculative_tokens=2)
    assert drafts.param == "num_speculative_tokens" and "leave one of them out" in str(drafts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(RequestError, match=r"there are 3 GPUs.* use at most 3$"):
        resolve_config(EngineConfig(tensor_parallel_size=4))
    assert resolve_config(EngineConfig(tensor_parallel_size=2)).run_ahead == RUN_AHEAD["cuda"]
