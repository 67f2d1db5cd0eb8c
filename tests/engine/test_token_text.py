"""What each token shows: the bytes of all tokens join to the text and to the reasoning, in chunks
as a whole; thinking that the model opens itself is reasoning, never content."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.answer_text import AnswerText
from s1engine.engine.llm import LLM
from s1engine.engine.token_text import TokenText
from s1engine.eval.arithmetic import generate
from s1engine.outputs import Chunk, RequestOutput
from s1engine.reasoning import encode_format
from s1engine.reasoning_specs import FORMAT_SPECS
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.tokenizer import Tokenizer
from tests.test_tokenizer import FALLBACK, TINY
from tests.tiny_tokenizer import CHATML, make_tokenizer

QUESTIONS = [question.question for question in generate(5, 8)]
FORMATS = [name for name, spec in FORMAT_SPECS.items() if spec.channels is None]


@pytest.mark.parametrize(("tokenizer", "alphabet"), [(TINY, None), (FALLBACK, "ab cé\n你€")])
def test_the_bytes_of_tokens_join_to_the_text(tokenizer: Tokenizer, alphabet: str | None) -> None:
    texts = st.text(alphabet) if alphabet else st.text(st.characters(codec="utf-8"))

    @given(texts)
    def check(text: str) -> None:
        ids, shown = tokenizer.encode(text), TokenText(tokenizer)
        joined = b"".join(shown.push(token, thinking=False, strips=False) for token in ids)
        assert joined.decode() == tokenizer.decode(ids)

    check()


@st.composite
def asked(draw: st.DrawFn) -> tuple[SamplingParams, bool | None]:
    budget = st.builds(ThinkingBudget, max_tokens=st.integers(0, 30), num_waits=st.integers(0, 2))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8, 1.5])),
        seed=draw(st.integers(0, 99)),
        max_tokens=draw(st.integers(50, 90)),
        logprobs=draw(st.sampled_from([0, 2])),
        thinking=draw(st.none() | budget),
    )
    return params, None if params.thinking else draw(st.sampled_from([None, False]))


def content(entries: object, thinking: bool) -> str:
    parts = [e.shown for e in entries if e.thinking is thinking]  # type: ignore[attr-defined]
    return b"".join(parts).decode(errors="replace")


@settings(max_examples=40)
@given(st.sampled_from(QUESTIONS), asked())
def test_logprobs_of_text_and_of_reasoning_are_apart(
    llm: LLM, question: str, request: tuple[SamplingParams, bool | None]
) -> None:
    params, enabled = request
    chat = [{"role": "user", "content": question}]
    *chunks, output = llm.stream_chat(chat, params, enable_thinking=enabled)
    assert isinstance(output, RequestOutput)
    (sample,) = output.outputs
    assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
    assert content(sample.logprobs, False) == sample.text
    assert content(sample.logprobs, True) == (sample.reasoning or "")
    parts = [chunk for chunk in chunks if isinstance(chunk, Chunk)]
    assert [entry for part in parts for entry in part.logprobs or ()] == sample.logprobs
    assert "".join(part.text for part in parts) == sample.text
    assert "".join(part.reasoning for part in parts) == (sample.reasoning or "")


def test_a_model_that_thinks_unasked_leaks_nothing(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=120)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(chats, params, enable_thinking=False)
    assert sum(output.usage.reasoning_tokens > 0 for output in outputs) >= 4  # s1-nano does
    for output in outputs:
        (sample,) = output.outputs
        assert "think" not in sample.text
        assert (sample.reasoning is None) == (output.usage.reasoning_tokens == 0)
        assert len(llm.engine.tokenizer.encode(sample.reasoning or "")) <= (
            output.usage.reasoning_tokens
        )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("own_tokens", [True, False])
@settings(max_examples=15)
@given(data=st.data())
def test_a_block_at_the_beginning_is_reasoning_in_all_formats(
    name: str, own_tokens: bool, data: st.DataObject
) -> None:
    spec = FORMAT_SPECS[name]
    singles = {spec.open_marker, *spec.closers, *spec.hidden} if own_tokens else set(spec.required)
    special = (*CHATML[:-1], *sorted({*spec.required} - {*CHATML}), CHATML[-1])
    tokenizer = make_tokenizer(special, tuple(sorted(singles - {*special})))
    markers = encode_format(spec, tokenizer, ()).answer_markers(False, opens=True)
    words = st.text("ab \n.", max_size=12)
    thought, answer = data.draw(words), data.draw(words)
    ids = tokenizer.encode(spec.open_marker + thought + spec.end + answer)
    text, parts = AnswerText(tokenizer, markers), []
    cuts = sorted({0, len(ids), *data.draw(st.lists(st.integers(0, len(ids)), max_size=5))})
    for begin, end in itertools.pairwise(cuts):
        parts.append(text.push(ids[begin:end]))
    parts.append(text.flush(True))
    assert "".join(part for part, _ in parts) == answer
    assert "".join(part for _, part in parts) == thought


def test_the_budget_of_a_thinking_that_was_ended_covers_its_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, thinking=ThinkingBudget(min_tokens=0, num_waits=5))
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    stream = llm.stream_chat(chat, params, request_id="ended")
    for event in stream:
        if isinstance(event, Chunk) and event.reasoning:
            llm.end_thinking("ended")
    assert isinstance(event, RequestOutput)
    used = event.outputs[0].thinking
    assert used is not None and used.end_reason == "client"
    assert used.budget >= used.tokens > 0
