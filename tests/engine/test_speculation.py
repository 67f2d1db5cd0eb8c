"""Speculative decoding gives the same outputs in fewer steps."""

from collections.abc import Iterator

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.config import EngineConfig, parse_speculative_config
from s1engine.engine.llm import LLM
from s1engine.engine.request import drafting_mode
from s1engine.errors import RequestError
from s1engine.runner.model_runner import ModelRunner
from s1engine.runner.resolved_config import resolve_config
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.server.metrics import Metrics
from tests.engine.test_multi_step import QUESTIONS, requests, texts


@pytest.fixture(scope="module", params=[{}, {"max_num_batched_tokens": 16}], ids=["wide", "narrow"])
def drafter(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """The model of ``llm``, which drafts as much as it can because every step has the same cost."""
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 256, **request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "profile_step_costs", lambda self: [])
        yield LLM(progress=False, dtype="float32", num_speculative_tokens=5, **options)


@settings(max_examples=12)
@given(requests)
def test_outputs_are_those_without_drafts(
    llm: LLM, drafter: LLM, asked: list[tuple[str, SamplingParams]]
) -> None:
    chats = [[{"role": "user", "content": question}] for question, _ in asked]
    params = [p for _, p in asked]
    before = drafter.engine.stats().num_accepted_tokens
    got = drafter.chat(chats, params, progress=False)
    event(f"accepted: {drafter.engine.stats().num_accepted_tokens > before}")
    for one, got_output, wanted in zip(
        params, got, llm.chat(chats, params, progress=False), strict=True
    ):
        assert texts(got_output.outputs) == texts(wanted.outputs), one
        branches = [[c.output for c in output.checkpoints] for output in (got_output, wanted)]
        assert texts(branches[0]) == texts(branches[1])
        assert got_output.usage.completion_tokens == wanted.usage.completion_tokens
    drafter.engine.scheduler.check_integrity()
    stats = drafter.engine.scheduler.stats()
    assert stats.num_free_blocks == drafter.engine.runner.num_blocks


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_trace_takes_fewer_steps(llm: LLM, drafter: LLM, temperature: float) -> None:
    budget = ThinkingBudget(num_waits=3)
    params = SamplingParams(temperature=temperature, seed=4, thinking=budget)
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    steps = []
    for one in (llm, drafter):
        before = one.engine.scheduler.stats().num_steps
        one.chat(chat, params, progress=False)
        steps.append(one.engine.scheduler.stats().num_steps - before)
    assert steps[1] < 0.7 * steps[0]


def test_an_answer_with_a_grammar_keeps_to_it_after_drafted_thinking(
    llm: LLM, drafter: LLM
) -> None:
    budget = ThinkingBudget(num_waits=2)
    params = SamplingParams(
        temperature=0, max_tokens=200, grammar='start: "<" /[0-9]{1,3}/ ">"', thinking=budget
    )
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    before = drafter.engine.stats()
    got_output, wanted = (one.chat(chat, params, progress=False)[0] for one in (drafter, llm))
    after = drafter.engine.stats()
    assert texts(got_output.outputs) == texts(wanted.outputs)
    assert after.num_accepted_tokens > before.num_accepted_tokens
    assert after.num_undrafted == before.num_undrafted + 1


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, "ALWAYS"),
        ({"logit_bias": {3: 1.0}, "stop": ("x",), "temperature": 0.3, "top_p": 0.5}, "ALWAYS"),
        ({"grammar": "start: /a/"}, "THINKING"),
        ({"logprobs": 0}, "NEVER"),
        ({"presence_penalty": 0.1, "grammar": "start: /a/"}, "NEVER"),
        ({"frequency_penalty": -0.1}, "NEVER"),
        ({"repetition_penalty": 1.1}, "NEVER"),
    ],
)
def test_the_drafting_mode_of_parameters(params: dict[str, object], wanted: str) -> None:
    assert drafting_mode(SamplingParams(**params)) is getattr(_core.Drafting, wanted)  # type: ignore[arg-type]


def test_run_ahead_and_drafts_exclude_one_another() -> None:
    with pytest.raises(RequestError, match=r"run_ahead.*num_speculative_tokens"):
        EngineConfig(run_ahead=2, num_speculative_tokens=1)
    assert resolve_config(EngineConfig(num_speculative_tokens=1)).run_ahead == 1
    with pytest.raises(RequestError, match="num_speculative_tokens"):
        EngineConfig(num_speculative_tokens=33)
    with pytest.raises(RequestError, match="tensor_parallel_size"):
        resolve_config(EngineConfig(num_speculative_tokens=1, tensor_parallel_size=2))


@given(st.integers(1, 4096), st.integers(0, 32), st.integers(0, 2**14))
def test_a_step_samples_at_least_a_token_a_sequence(seqs: int, draft: int, more: int) -> None:
    config = EngineConfig(
        max_num_seqs=seqs, max_num_batched_tokens=seqs + more, num_speculative_tokens=draft
    )
    assert seqs <= config.max_samples <= config.max_num_batched_tokens


def test_metrics_count_drafts(drafter: LLM) -> None:
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(num_waits=3))
    drafter.chat([{"role": "user", "content": QUESTIONS[0]}], params, progress=False)
    stats = drafter.engine.stats()
    text = Metrics("m", lambda: stats).render().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    counts = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "spec_" in line}
    assert counts["s1engine:spec_decode_num_drafts_total"] == stats.num_drafts > 0
    assert counts["s1engine:spec_decode_num_draft_tokens_total"] == stats.num_draft_tokens
    assert counts["s1engine:spec_decode_num_accepted_tokens_total"] == stats.num_accepted_tokens
    assert counts["s1engine:spec_decode_undrafted_total"] == stats.num_undrafted


def test_vllms_spelling() -> None:
    assert parse_speculative_config('{"method": "ngram", "num_speculative_tokens": 4}') == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("4", "method"),
        ('{"method": "eagle", "num_speculative_tokens": 4}', "method"),
        ('{"method": "ngram"}', "num_speculative_tokens must be an integer"),
        ('{"method": "ngram", "num_speculative_tokens": 99}', "between 1 and 32"),
        ('{"method": "ngram", "num_speculative_tokens": 2, "model": "m"}', "unknown fields: model"),
    ],
)
def test_a_bad_speculative_config_is_rejected(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_speculative_config(text)
