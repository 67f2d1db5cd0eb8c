"""Multi-step decode gives the outputs of single steps, for any number of steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import ModelError, RequestError
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput
from s1engine.runner.cuda_graph import MAX_DEVICE_ROWS, CudaGraphRunner, buckets
from s1engine.runner.device_batch import DeviceBatchFormat
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = ["a=3 b=a+4 c=b*2 c?", "q=1 w=q*7 e=w-5 e?", "x=2 x?"]


@pytest.fixture(scope="module", params=[3, 32])
def multi(request: pytest.FixtureRequest) -> LLM:
    """The model of ``llm`` with multi-step decode."""
    return LLM(
        progress=False,
        dtype="float32",
        max_num_seqs=6,
        max_num_batched_tokens=256,
        run_ahead=request.param,
    )


def graphs_of(llm: LLM) -> CudaGraphRunner:
    assert isinstance(llm.engine.runner, ModelRunner)
    assert llm.engine.runner.multi_step is not None
    return llm.engine.runner.multi_step


@st.composite
def asked(draw: st.DrawFn) -> SamplingParams:
    maximum = draw(st.none() | st.integers(0, 60))
    deep = maximum is None or maximum > 20
    budget = ThinkingBudget(
        max_tokens=maximum,
        num_waits=draw(st.integers(0, 2)),
        wait_text=draw(st.sampled_from(["Wait", "", "Hmm\n"])),
        checkpoints=draw(st.sampled_from([(), (5, 20) if deep else ()])),
        loop_repeats=draw(st.sampled_from([None, 4])),
        answer_reserve=4,
    )
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.9])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.2])),
        logprobs=draw(st.sampled_from([None, None, None, 2])),
        stop=draw(st.sampled_from([(), (), ("Answer",), ("7", "2")])),
        seed=draw(st.integers(0, 9)),
        n=draw(st.integers(1, 2)),
        max_tokens=draw(st.integers(24, 64)),
        min_tokens=draw(st.sampled_from([0, 0, 0, 18, 24])),
        thinking=draw(st.sampled_from([budget, budget, None])),
    )


def texts(outputs: list[CompletionOutput]) -> list[CompletionOutput]:
    """Without log-probabilities, whose last bits depend on the rest of the batch."""
    return [replace(output, logprobs=None) for output in outputs]


requests = st.lists(st.tuples(st.sampled_from(QUESTIONS), asked()), min_size=1, max_size=5)


@settings(max_examples=20)
@given(requests)
def test_outputs_are_those_of_single_steps(
    llm: LLM, multi: LLM, asked: list[tuple[str, SamplingParams]]
) -> None:
    chats = [[{"role": "user", "content": question}] for question, _ in asked]
    params = [p for _, p in asked]
    launches = graphs_of(multi).num_launches
    got = multi.chat(chats, params, progress=False)
    event(f"multi-step: {graphs_of(multi).num_launches > launches}")
    for one, found, wanted in zip(
        params, got, llm.chat(chats, params, progress=False), strict=True
    ):
        assert texts(found.outputs) == texts(wanted.outputs), one
        assert [c.budget for c in found.checkpoints] == [c.budget for c in wanted.checkpoints]
        children = [[c.output for c in output.checkpoints] for output in (found, wanted)]
        assert texts(children[0]) == texts(children[1])
        assert found.usage.completion_tokens == wanted.usage.completion_tokens
    multi.engine.scheduler.check_integrity()
    stats = multi.engine.scheduler.stats()
    assert stats.num_free_blocks == multi.engine.runner.num_blocks


@pytest.mark.parametrize("end_early", [0, 1, 2, 3])
def test_an_end_that_max_tokens_cuts_is_cut_alike(llm: LLM, multi: LLM, end_early: int) -> None:
    """Prompts in which the model ends its thinking soon, and limits that cut the end, or all but
    its last tokens."""
    compiler = llm.engine.compiler
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    request = compiler.compile(chat, SamplingParams(temperature=0, max_tokens=300))
    (whole,) = llm.generate_requests([request], progress=False)[0].outputs
    assert whole.thinking is not None and whole.thinking.end_reason == "natural"
    begun = whole.token_ids[: whole.thinking.tokens - end_early]
    prompt, rest = request.prompt.tolist() + begun, whole.token_ids[len(begun) :]
    sizes = range(1, 8)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in sizes]
    for engine in (llm, multi):
        outputs = engine.generate([prompt] * len(sizes), params, progress=False)
        for n, output in zip(sizes, outputs, strict=True):
            (sample,) = output.outputs
            assert sample.finish_reason == "length"
            assert len(sample.token_ids) == n
            if sample.thinking is not None and sample.thinking.end_reason != "budget":
                assert sample.token_ids == rest[:n]


def test_chunks_join_to_the_output(multi: LLM) -> None:
    multi.call(check_chunks)


def check_chunks(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(num_waits=1))
    for i, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        engine.add_request(engine.make_request(chat, params, request_id=str(i), stream=True))
    chunks: dict[str, list[Chunk]] = {str(i): [] for i in range(len(QUESTIONS))}
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for name, found in engine.step():
            if isinstance(found, Chunk):
                chunks[name].append(found)
            elif isinstance(found, RequestOutput):
                outputs[name] = found
    for name, output in outputs.items():
        assert "".join(c.text for c in chunks[name]) == output.outputs[0].text
        assert "".join(c.reasoning for c in chunks[name]) == output.outputs[0].reasoning
        tokens = [token for chunk in chunks[name] for token in chunk.token_ids]
        assert tokens == output.outputs[0].token_ids


OVERRIDDEN = SamplingParams(temperature=0, thinking=ThinkingBudget(min_tokens=40))


def test_the_host_overrides_steps_in_flight(multi: LLM) -> None:
    """end_thinking, abort and a new request while steps are in flight."""
    alone = multi.chat([{"role": "user", "content": QUESTIONS[0]}], OVERRIDDEN)[0]
    multi.call(lambda engine: check_overrides(engine, alone))


def check_overrides(engine: LLMEngine, alone: RequestOutput) -> None:
    chat = [{"role": "user", "content": QUESTIONS[0]}]

    def add(name: str) -> None:
        engine.add_request(engine.make_request(chat, OVERRIDDEN, request_id=name))

    add("ended")
    add("aborted")
    sequence, thought = engine._live_requests["ended"].samples[0].seq_id, 0
    while thought < 5:
        engine.step()
        thought = engine.scheduler.collect_output_dict(sequence)["thinking_tokens"]
    assert isinstance(engine.runner, ModelRunner) and engine.runner.multi_step is not None
    assert engine.runner.multi_step.in_flight
    assert engine.end_thinking("ended")
    assert engine.abort("aborted") is not None
    add("new")
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs |= {n: e for n, e in engine.step() if isinstance(e, RequestOutput)}
    ended = outputs["ended"].outputs[0].thinking
    assert ended is not None and ended.end_reason == "client"
    assert ended.tokens <= thought + 1  # what the device decoded since was dropped
    assert outputs["new"].outputs == alone.outputs
    stats = engine.scheduler.stats()
    assert stats.num_free_blocks == engine.runner.num_blocks


@pytest.mark.parametrize("stream", [True, False])
def test_launches_are_short_while_a_reader_waits(
    multi: LLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that needs 1.1 ms for a step: at most 8 ms of steps in flight, else 32 ms."""
    collect, lengths = CudaGraphRunner.collect, []

    def collect_slowly(self: CudaGraphRunner) -> tuple[np.ndarray, float]:
        tokens, _ = collect(self)
        lengths.append(len(tokens))
        return tokens, 1.1e-3 * len(tokens)

    monkeypatch.setattr(CudaGraphRunner, "collect", collect_slowly)
    multi.call(lambda engine: decode_alone(engine, stream))  # learns the time
    multi.call(lambda engine: decode_alone(engine, stream))
    most = min(3 if stream else 14, multi.engine.runner.max_steps)
    assert max(lengths[-6:]) == most


def decode_alone(engine: LLMEngine, stream: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    engine.add_request(engine.make_request([5, 6, 7], params, stream=stream))
    while engine.has_unfinished:
        engine.step()


@given(st.integers(1, 3000))
def test_buckets_cover_every_batch_up_to_the_kernels_limit(max_num_seqs: int) -> None:
    sizes = buckets(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] == min(max_num_seqs, MAX_DEVICE_ROWS)


def test_a_step_that_cannot_be_captured_is_named() -> None:
    from s1engine.ops.triton_ops import TritonOps

    def step(run: object, filtered: bool) -> None:
        TritonOps().rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-6)

    runner = CudaGraphRunner(
        step,
        max_steps=2,
        max_num_seqs=1,
        block_table=torch.zeros((1, 1), dtype=torch.int32),
        fmt=DeviceBatchFormat(ThinkingEnds(), np.zeros(4, np.uint8), 4, 4),
        device="cpu",
    )
    with pytest.raises(ModelError, match=r"1 sequences, in rms_norm.*enforce-eager"):
        runner.capture(progress=False)


def test_run_ahead_is_checked() -> None:
    with pytest.raises(RequestError, match="run_ahead"):
        LLM(progress=False, run_ahead=0)
