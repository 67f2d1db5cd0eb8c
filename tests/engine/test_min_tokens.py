"""``min_tokens``: a request ends by no end-of-text, stop id or stop string before it has generated
so many tokens. The oracle is a logits processor that bans the same ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from s1engine.engine.llm import LLM
from s1engine.engine.sequence_output import StopStringFinder
from s1engine.errors import RequestError
from s1engine.eval.arithmetic import generate
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = [question.question for question in generate(11, 6)]
STOPS = ("7", "1", "Answer", "a=")


@st.composite
def asked(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(30, 90))
    budget = ThinkingBudget(max_tokens=draw(st.integers(0, 40)), answer_reserve=4)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop=draw(st.sampled_from([(), STOPS])),
        stop_token_ids=draw(st.lists(st.integers(10, 40), max_size=2)),
        thinking=draw(st.sampled_from([budget, None])),
    )


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), asked()), min_size=1, max_size=6))
def test_no_request_ends_before_and_crowded_equals_alone(
    llm: LLM, tight: LLM, requests: list[tuple[str, SamplingParams]]
) -> None:
    chats = [[{"role": "user", "content": question}] for question, _ in requests]
    params = [one for _, one in requests]
    crowd = tight.chat(chats, params)
    for chat, one, got in zip(chats, params, crowd, strict=True):
        (sample,) = got.outputs
        ends = 1 if sample.finish_reason == "stop" else 0  # the end itself is the next token
        assert len(sample.token_ids) - ends >= one.min_tokens, one
        assert llm.chat([chat], one)[0].outputs == got.outputs


class BanUntil:
    """The rule as a logits processor."""

    def __init__(self, ids: list[int], length: int) -> None:
        self._ids, self._length = ids, length

    def __call__(self, token_ids: NDArray[np.int32], logits: NDArray[np.float32]) -> None:
        if len(token_ids) < self._length:
            logits[self._ids] = -np.inf


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("min_tokens", [1, 7, 25])
def test_it_bans_the_ends_and_nothing_else(llm: LLM, min_tokens: int, temperature: float) -> None:
    prompt = llm.engine.tokenizer.encode(QUESTIONS[0])
    ends = [*llm.engine.compiler.text.eos_token_ids, 20]
    fields = {"temperature": temperature, "seed": 3, "max_tokens": 40, "stop_token_ids": [20]}
    processor = BanUntil(ends, len(prompt) + min_tokens)
    got = llm.generate([prompt], SamplingParams(**fields, min_tokens=min_tokens))[0]
    want = llm.generate([prompt], SamplingParams(**fields, logits_processors=[processor]))[0]
    assert got.outputs == want.outputs


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba"])), st.integers(0, 6))
def test_a_stop_string_counts_if_a_later_token_completes_it(
    tokens: list[str], min_tokens: int
) -> None:
    finder, shown = StopStringFinder(("ab",)), ""
    for i, token in enumerate(tokens):
        shown += finder.push(token, may_match=i >= min_tokens)
        if finder.match:
            break
    shown += finder.push("", last=True)
    text, ends = "", 0  # of the first stop string that ends in a token from min_tokens on
    for i, token in enumerate(tokens):
        before, text = len(text), text + token
        hits = [at for at in range(len(text)) if text.startswith("ab", at) and at + 2 > before]
        if hits and i >= min_tokens:
            text, ends = text[: hits[0]], 1
            break
    assert (shown, finder.match is not None) == (text, bool(ends))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "max_tokens"),
        ({"min_tokens": 5, "regex": "a+"}, "regex"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named) as refused:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert refused.value.param == "min_tokens"
