"""End markers of several tokens in the whole engine: a random model that writes them all the time,
cut in every way. Greedy output equals s1's algorithm over transformers' logits, however it runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from s1engine.engine.end_markers import make_token_bytes
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.core import reference
from tests.tiny_models import make_model
from tests.tiny_tokenizer import CHATML, TEMPLATE, make_backend

MARKER = "</>"
PIECES = ("</", "/>", ".<", ">\n\n", ".</", "/>a")  # tokens, besides single characters
WRITTEN = (*"</>.a\n", *PIECES)
PROMPTS = ("why", "what is it", "é 7", "a < b", "so </> it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes little but the pieces of its marker, and now and then an end."""
    backend = make_backend(CHATML, PIECES)
    eos = backend.token_to_id(CHATML[2])
    sizes = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 512}
    path = make_model(tmp_path_factory.mktemp("model"), "llama", eos_token_id=eos, **sizes)
    model = AutoModelForCausalLM.from_pretrained(path)
    written = [backend.encode(text).ids for text in WRITTEN]
    assert all(len(ids) == 1 for ids in written)
    kept = torch.zeros(sizes["vocab_size"], 1)
    kept[[ids[0] for ids in written]] = 4.0
    kept[eos] = 2.0
    with torch.no_grad():
        model.lm_head.weight.mul_(kept)
    model.save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=CHATML[2], chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


def engine(folder: Path, **options: object) -> LLM:
    fields: dict[str, object] = {
        "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128,
        "reasoning_start": "<r>", "reasoning_end": MARKER,
    }  # fmt: skip
    return LLM(str(folder), progress=False, **{**fields, **options})


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    yield engine(folder)


VARIANTS: dict[str, dict[str, object]] = {
    "preempted": {"max_num_batched_tokens": 24, "kv_cache_memory_gb": 0.0},
    "cold": {"enable_prefix_caching": False},
    "multi-step": {"run_ahead": 8},
    "drafts": {"num_speculative_tokens": 4},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    options = dict(VARIANTS[request.param])
    if request.param == "preempted":  # the cache holds one and a half sequences
        options["kv_cache_memory_gb"] = 1.5 * 256 * 2 * 2 * 2 * 8 * 4 / 2**30
    yield engine(folder, **options)


@st.composite
def budgets(draw: st.DrawFn) -> ThinkingBudget:
    maximum = draw(st.integers(0, 60))
    minimum = draw(st.integers(0, maximum))
    chosen = draw(st.sampled_from([(), (), (maximum // 2,), (5, 9, 30)]))
    return ThinkingBudget(
        max_tokens=maximum,
        min_tokens=minimum,
        num_waits=draw(st.integers(0, 3)),
        wait_text=draw(st.sampled_from(["Wait", "", "Hmm\n", "<"])),
        checkpoints=tuple(c for c in chosen if minimum <= c < maximum),
        loop_repeats=draw(st.sampled_from([None, None, 4])),
        answer_reserve=4,
    )


def params_of(budget: ThinkingBudget) -> SamplingParams:
    below = tuple(
        c for c in budget.checkpoints if budget.min_tokens <= c < (budget.max_tokens or 0)
    )
    budget = replace(budget, checkpoints=below)
    return SamplingParams(temperature=0, max_tokens=110, thinking=budget)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


asked = st.lists(st.tuples(st.sampled_from(PROMPTS), budgets()), min_size=1, max_size=6)


def comparable(output: RequestOutput) -> object:
    children = [(c.budget, replace(c.output, logprobs=None)) for c in output.checkpoints]
    return [replace(sample, logprobs=None) for sample in output.outputs], children


@settings(max_examples=12)
@given(asked)
def test_every_way_of_running_gives_the_same(
    plain: LLM, variant: LLM, asked: list[tuple[str, ThinkingBudget]]
) -> None:
    chats = [chat(prompt) for prompt, _ in asked]
    params = [params_of(budget) for _, budget in asked]
    crowded = variant.chat(chats, params, progress=False)
    variant.engine.scheduler.check_integrity()
    event(f"preempted: {variant.engine.scheduler.stats().num_preemptions > 0}")
    event(f"drafts accepted: {variant.engine.scheduler.stats().num_accepted_tokens > 0}")
    for one, each, got in zip(chats, params, crowded, strict=True):
        plain.engine.scheduler.clear_cache()
        alone = plain.chat(one, each, progress=False)[0]
        assert comparable(got) == comparable(alone)
    stats = variant.engine.scheduler.stats()
    assert stats.num_free_blocks == variant.engine.runner.num_blocks


@settings(max_examples=20)
@given(st.sampled_from(PROMPTS), budgets())
def test_greedy_output_equals_the_algorithm_on_transformers(
    folder: Path, plain: LLM, prompt: str, budget: ThinkingBudget
) -> None:
    params = params_of(replace(budget, checkpoints=(), loop_repeats=None))
    assert params.thinking is not None and plain.engine.format is not None
    request = plain.engine.make_request(chat(prompt), params)  # type: ignore[arg-type]
    (output,) = plain.generate_requests([request], progress=False)
    sample, core, fmt = output.outputs[0], request.budget, plain.engine.format
    assert core is not None and sample.thinking is not None
    tokenizer, size = plain.engine.tokenizer, plain.engine.tokenizer.num_tokens
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def rank(ids: list[int]) -> list[int]:
        with torch.no_grad():
            return oracle(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()

    expected = reference.think(
        rank,
        request.prompt.tolist(),
        reference.Format(
            triggers=frozenset(fmt.triggers),
            natural_end=fmt.natural_end,
            newline=fmt.newline,
            newline_always=fmt.newline_always,
            newlines=frozenset(tokenizer.newline_ids),
            markers=(MARKER.encode(),),
            token_bytes=tuple(map(make_token_bytes(tokenizer), range(size))),
        ),
        reference.Budget(
            core.max_thinking,
            core.min_thinking,
            core.num_waits,
            tuple(core.wait),
            tuple(core.forced_end),
        ),
    )
    event(expected.end_reason)
    event(f"waits: {expected.waits_used > 0}")
    length = len(expected.token_ids)
    assert sample.token_ids[:length] == expected.token_ids
    assert sample.forced[:length] == expected.forced
    assert sample.thinking.tokens == expected.thinking_tokens <= core.max_thinking
    assert sample.thinking.tokens >= core.min_thinking
    assert sample.thinking.waits_used == expected.waits_used
    assert sample.thinking.end_reason == expected.end_reason.lower()


@settings(max_examples=12)
@given(st.sampled_from(PROMPTS), budgets())
def test_the_text_is_split_at_the_marker(plain: LLM, prompt: str, budget: ThinkingBudget) -> None:
    """The decoding of all tokens, cut where the thinking ends; streamed it is the same."""
    params = params_of(replace(budget, checkpoints=(), loop_repeats=None))
    request = plain.engine.make_request(chat(prompt), params, stream=True)  # type: ignore[arg-type]
    events = list(plain.generate_request(request))
    chunks = [event for event in events if isinstance(event, Chunk)]
    (output,) = [event for event in events if isinstance(event, RequestOutput)]
    sample = output.outputs[0]
    assert "".join(chunk.text for chunk in chunks) == sample.text
    assert "".join(chunk.reasoning for chunk in chunks) == sample.reasoning
    assert [token for chunk in chunks for token in chunk.token_ids] == sample.token_ids
    assert sample.reasoning is not None and sample.thinking is not None
    whole = plain.engine.tokenizer.decode(sample.token_ids)
    # An end that the minimum refuses is never written, but without a wait text its parts may be.
    if sample.thinking.end_reason == "natural":
        thinking, marker, answer = whole.partition(MARKER)
        assert marker and sample.reasoning == thinking.lstrip("\n")
        assert sample.text == answer.replace(MARKER, "").lstrip("\n")
    assert MARKER not in sample.text
    # Only sampled tokens match: a wait text that is half a marker may become one in the text.
    assert MARKER not in sample.reasoning or budget.wait_text == "<"


@settings(max_examples=12)
@given(st.sampled_from(PROMPTS), budgets(), st.sets(st.integers(1, 40), min_size=1, max_size=4))
def test_checkpoints_equal_separate_runs(
    plain: LLM, prompt: str, budget: ThinkingBudget, chosen: set[int]
) -> None:
    assert budget.max_tokens is not None
    below = tuple(c for c in sorted(chosen) if budget.min_tokens <= c < budget.max_tokens)
    params = params_of(replace(budget, checkpoints=below, loop_repeats=None))
    assert params.thinking is not None
    output = plain.chat(chat(prompt), params, progress=False)[0]
    for checkpoint in output.checkpoints:
        smaller = replace(params.thinking, max_tokens=checkpoint.budget, checkpoints=())
        alone = plain.chat(chat(prompt), replace(params, thinking=smaller), progress=False)[0]
        got, wanted = checkpoint.output, alone.outputs[0]
        assert (got.text, got.reasoning) == (wanted.text, wanted.reasoning)
        assert got.token_ids == wanted.token_ids


def test_end_thinking_and_abort_in_the_middle_of_a_marker(plain: LLM) -> None:
    """At every moment: nothing of a marker is shown, and nothing is lost."""

    def run(engine: LLMEngine) -> int:
        halves = 0
        for steps in range(1, 40):
            for abort in (False, True):
                params = SamplingParams(temperature=0, thinking=ThinkingBudget(min_tokens=60))
                request = engine.make_request(chat("why"), params)  # type: ignore[arg-type]
                engine.add_request(request)
                for _ in range(steps):
                    engine.step()
                sequence = engine._live_requests[request.request_id].samples[0].seq_id
                state = engine.scheduler.collect_output_dict(sequence)
                halves += state["held"] > 0
                if abort:
                    engine.abort(request.request_id)
                else:
                    assert engine.end_thinking(request.request_id)
                    thought = state["thinking_tokens"]
                    while engine.has_unfinished:
                        engine.step()
                        engine.scheduler.check_integrity()
                    assert thought <= 60
                engine.scheduler.check_integrity()
                assert not engine.has_unfinished
        return halves

    assert plain.call(run) > 5
    assert plain.engine.scheduler.stats().num_free_blocks == plain.engine.runner.num_blocks
