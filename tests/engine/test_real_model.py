"""A real model against transformers: the same greedy tokens for real prompts, with and without
budgets of thinking. One forward of transformers over prompt and output proves a whole output: its
choice at every position equals the engine's next token, so by induction so does its own loop."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from s1engine.engine.llm import LLM
from s1engine.outputs import CompletionOutput, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.core import reference
from tests.real_model import (
    NEAR_TIE,
    Oracle,
    gap_of,
    real_model_file,
    real_prompts,
    shared_tmp,
    transformers_model,
)

pytestmark = pytest.mark.timeout(900)  # 80 s of one core, and other workers want it too

PROMPTS, TOKENS = 200, 8
QUESTIONS = ("What is 2 + 2?", "Is 9 odd? Say yes or no.")
MAX_TOKENS = 96
BUDGETS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"max_tokens": 9},
    {"max_tokens": 60, "num_waits": 2},
    {"max_tokens": 60, "min_tokens": 40, "wait_text": "Wait, check.\n"},
    {"max_tokens": 60, "min_tokens": 30, "wait_text": ""},
    {"max_tokens": 48, "num_waits": 1, "checkpoints": (5, 17, 40)},
)


@pytest.fixture(scope="module")
def real_llm() -> Iterator[LLM]:
    """The model in float32, without a flag: it thinks, in s1's format, only if a request asks."""
    threads = torch.get_num_threads()
    yield LLM(
        model=str(real_model_file()),
        progress=False,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=50,
        max_num_batched_tokens=512,
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(transformers_model(real_model_file(), shared_tmp(tmp_path_factory)))


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_greedy_chat_equals_transformers_on_200_real_prompts(real_llm: LLM, oracle: Oracle) -> None:
    """Batched, chunked and with cached prefixes. Only a near-tie excuses another token; what
    follows one is not compared."""
    prompts = real_prompts(PROMPTS)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    outputs = real_llm.chat([chat(text) for text in prompts], greedy, progress=False)
    ties, checked = 0, 0
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        assert tokens and output.outputs[0].reasoning is None
        rows = oracle.logits_after(prompt + tokens[:-1], len(prompt) - 1)
        for row, token in zip(rows, tokens, strict=True):
            if row.argmax() != token:
                assert gap_of(row) < NEAR_TIE, (gap_of(row), prompt, tokens)
                ties += 1
                break
            checked += 1
    assert checked > 6 * PROMPTS and ties <= 2, (checked, ties)


class Replay:
    """transformers as the model of the reference: ``model(ids)`` for prefixes of one sequence, from
    one forward over it. The reference asks for another prefix only if the engine went wrong."""

    def __init__(self, oracle: Oracle, prompt: list[int], output: list[int]) -> None:
        self._ids = prompt + output
        self._first = len(prompt) - 1
        self._rows: Tensor = oracle.logits_after(self._ids, self._first)

    def __call__(self, ids: list[int]) -> Sequence[int]:
        assert ids == self._ids[: len(ids)], "the engine took another way"
        row = self._rows[len(ids) - 1 - self._first]
        assert gap_of(row) > NEAR_TIE, "choose a question without a near-tie"
        ranking: list[int] = row.topk(8).indices.tolist()
        return ranking


def reference_format(llm: LLM) -> reference.Format:
    fmt = llm.engine.format
    assert fmt is not None
    return reference.Format(
        triggers=frozenset(fmt.triggers),
        natural_end=fmt.natural_end,
        newline=fmt.newline,
        newline_always=fmt.newline_always,
        newlines=frozenset(llm.engine.tokenizer.newline_ids),
    )


def check_budget(
    llm: LLM, oracle: Oracle, prompt: list[int], fields: dict[str, Any],
    sample: CompletionOutput,
) -> None:  # fmt: skip
    """The sample is what s1's algorithm makes of transformers' choices."""
    assert llm.engine.format is not None and sample.thinking is not None
    budget = reference.Budget(
        max_thinking=fields["max_tokens"],
        min_thinking=fields.get("min_tokens", 0),
        num_waits=fields.get("num_waits", 0),
        wait=tuple(llm.engine.tokenizer.encode(fields.get("wait_text", "Wait"))),
        forced_end=llm.engine.format.forced_end(),
    )
    model = Replay(oracle, prompt, sample.token_ids)
    thought = reference.think(model, prompt, reference_format(llm), budget)
    stops = frozenset([llm.engine.tokenizer.eos_token_id])
    left = MAX_TOKENS - len(thought.token_ids)
    answer, _ = reference.answer(model, prompt + thought.token_ids, stops, left)
    assert sample.token_ids == thought.token_ids + answer
    assert sample.forced == thought.forced + [0] * len(answer)
    assert sample.thinking.tokens == thought.thinking_tokens
    assert sample.thinking.waits_used == thought.waits_used


@pytest.fixture(scope="module")
def budgeted(real_llm: LLM) -> list[list[RequestOutput]]:
    """Outputs of QUESTIONS for each of BUDGETS, computed in one batch."""
    asked = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            thinking=ThinkingBudget(**fields, answer_reserve=15),
        )
        for fields in BUDGETS
        for _ in QUESTIONS
    ]
    chats = [chat(text) for text in QUESTIONS] * len(BUDGETS)
    outputs = real_llm.chat(chats, asked, progress=False)
    size = len(QUESTIONS)
    return [outputs[at : at + size] for at in range(0, len(outputs), size)]


@pytest.mark.parametrize("index", range(len(BUDGETS)))
def test_budgets_equal_a_plain_loop_of_transformers(
    real_llm: LLM, oracle: Oracle, budgeted: list[list[RequestOutput]], index: int
) -> None:
    fields = BUDGETS[index]
    for output in budgeted[index]:
        prompt = output.prompt_token_ids
        check_budget(real_llm, oracle, prompt, fields, output.outputs[0])
        assert [one.budget for one in output.checkpoints] == list(fields.get("checkpoints", ()))
        for checkpoint in output.checkpoints:
            smaller = {**fields, "max_tokens": checkpoint.budget}
            check_budget(real_llm, oracle, prompt, smaller, checkpoint.output)


def test_the_budgets_wait_and_end_in_every_way(budgeted: list[list[RequestOutput]]) -> None:
    used = [output.outputs[0].thinking for outputs in budgeted for output in outputs]
    assert {one.end_reason for one in used if one} == {"natural", "budget"}
    assert sum(one.waits_used for one in used if one) > 2


def test_quantized_weights_stay_near_the_floats(real_llm: LLM) -> None:
    """A sanity bound; the study ``quantized_weights`` measures with ``--text``."""
    asked = SamplingParams(temperature=0, max_tokens=1)
    texts = [chat(text) for text in real_prompts(8)]
    exact = real_llm.chat(texts, asked, progress=False)
    coarse = LLM(
        model=str(real_model_file()), progress=False, dtype="float32", quantization="int8",
         max_model_len=512,
    ).chat(texts, asked, progress=False)  # fmt: skip
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids
            for a, b in zip(exact, coarse, strict=True)]  # fmt: skip
    assert sum(same) >= 6
