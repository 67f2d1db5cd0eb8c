"""Other names of our fields: they mean the same, and errors name the one that was sent."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from s1engine.errors import RequestError
from s1engine.sampling_params import UNLIMITED, SamplingParams
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.completions import CompletionRequest
from s1engine.server.api.request_fields import GenerationFields, first_error
from s1engine.server.api.spellings import SPELLINGS, Path
from tests.server.conftest import Served

HELLO = [{"role": "user", "content": "a=1 a?"}]
GOOD: dict[str, Any] = {
    "thinking_token_budget": 9,
    "min_thinking_tokens": 2,
    "num_waits": 3,
    "wait_text": "Hmm",
    "final_text": "So",
    "answer_reserve": 4,
    "thinking_deadline_ms": 5,
    "thinking_loop_repeats": 6,
    "enable_thinking": False,
    "reasoning_effort": "low",
    "max_tokens": 7,
    "seed": 8,
    "stop": ["x"],
    "json_schema": {"type": "object"},
    "regex": "a+",
    "choice": ["a", "b"],
    "grammar": 'start: "a"',
    "json_object": True,
}
BAD: dict[str, Any] = {
    "thinking_token_budget": -2,
    "min_thinking_tokens": -1,
    "num_waits": 10**6,
    "wait_text": "x" * 9999,
    "final_text": "x" * 9999,
    "answer_reserve": -1,
    "thinking_deadline_ms": -1,
    "thinking_loop_repeats": 0,
    "reasoning_effort": "heroic",
    "max_tokens": 2**40,
    "seed": 2**70,
    "stop": [""],
    "regex": "x" * 2**17,
    "choice": ["x" * 2**17],
    "grammar": "x" * 2**17,
}
NOT_SPELT = {"json_object", "choice"}  # their own names are no fields of a body
names = st.sampled_from(sorted(GOOD))


def nested(path: Path, value: Any) -> dict[str, Any]:
    """The fields of a body that has a value at this place."""
    if path == ("thinking", "type"):
        value = "disabled" if value is False else value
    if path == ("thinking", "budget_tokens"):
        return {"thinking": {"type": "enabled", "budget_tokens": value}}
    for name in reversed(path):
        value = {name.rstrip("_"): value}
    return dict(value)


def paths_of(name: str) -> list[Path]:
    return [path for path in SPELLINGS[name] if path != (name,) or name not in NOT_SPELT]


def params_of(fields: dict[str, Any]) -> tuple[SamplingParams, Any]:
    """As Generation does it."""
    try:
        body = ChatRequest.model_validate({"messages": HELLO, **fields})
    except ValidationError as error:
        raise first_error(error.errors()) from error
    try:
        return body.sampling_params({}), body.options()["enable_thinking"]
    except RequestError as error:
        raise body.renamed_error(error) from error


def test_the_table_is_covered() -> None:
    assert set(SPELLINGS) - {"thinking_early_exit"} == set(GOOD)
    fields = GenerationFields.model_fields
    for name, paths in SPELLINGS.items():
        roots = {path[0] for path in paths if path != (name,)} - {"chat_template_kwargs"}
        assert roots <= set(fields), name


@given(names, st.data())
def test_every_spelling_means_the_same(name: str, data: st.DataObject) -> None:
    paths = paths_of(name)
    path, other = data.draw(st.sampled_from(paths)), data.draw(st.sampled_from(paths))
    params, enabled = params_of(nested(path, GOOD[name]))
    expected, expected_enabled = params_of(nested(paths[0], GOOD[name]))
    assert params == expected
    if "thinking" not in path:
        assert enabled == expected_enabled
    if path[0] != other[0] and other[0] not in ("guided_json_object", "thinking"):
        both = {**nested(path, GOOD[name]), **nested(other, GOOD[name])}
        assert params_of(both)[0] == expected


@given(st.sampled_from(sorted(BAD)), st.data())
def test_an_error_names_the_field_that_was_sent(name: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(paths_of(name)))
    with pytest.raises(RequestError) as error:
        params_of(nested(path, BAD[name]))
    assert error.value.param == path[0]
    assert ".".join(path) in str(error.value)


@given(names, st.data())
def test_spellings_that_differ_are_refused(name: str, data: st.DataObject) -> None:
    if name not in BAD:
        return
    first, second = (
        data.draw(st.permutations(paths_of(name)))[:2] if len(SPELLINGS[name]) > 1 else ((), ())
    )
    if not second or first[0] == second[0]:
        return
    with pytest.raises(RequestError) as error:
        params_of({**nested(first, GOOD[name]), **nested(second, BAD[name])})
    assert error.value.param in (first[0], second[0])


def test_minus_one_is_no_limit() -> None:
    for path in paths_of("max_tokens"):
        assert params_of(nested(path, -1))[0].max_tokens is None
    for path in paths_of("thinking_token_budget"):
        thinking = params_of(nested(path, -1))[0].thinking
        assert thinking is not None and thinking.max_tokens == UNLIMITED
    body = CompletionRequest.model_validate({"prompt": "a", "max_tokens": -1})
    assert body.sampling_params({"max_tokens": 5}).max_tokens is None


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 16),
        ({"max_tokens": None}, 16),
        ({"max_tokens": 5}, 5),
        ({"thinking_token_budget": 3}, None),
    ],
)
def test_completions_default_to_sixteen_tokens(fields: dict[str, Any], limit: int | None) -> None:
    body = CompletionRequest.model_validate({"prompt": "a", **fields})
    assert body.sampling_params({}).max_tokens == limit


def test_an_empty_stop_asks_for_nothing() -> None:
    assert params_of({"stop": ""})[0] == params_of({})[0] == params_of({"stop": []})[0]


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"thinkingTokenBudget": 4}, "did you mean thinking_token_budget"),
        ({"temperature": 0.5}, "field of the body"),
        ({"thinking_token_budget": 1.5}, "must be an integer"),
        ({"enable_thinking": True, "thinking": False}, "differ"),
    ],
)
def test_thinking_in_template_variables_is_never_ignored(kwargs: Any, hint: str) -> None:
    with pytest.raises(RequestError, match=hint) as error:
        params_of({"chat_template_kwargs": kwargs})
    assert error.value.param == "chat_template_kwargs"


def test_extra_body_is_the_body() -> None:
    fields = {"thinking_token_budget": 4, "temperature": 0.5}
    assert params_of({"extra_body": fields}) == params_of(fields)
    assert params_of({"extra_body": fields, **fields}) == params_of(fields)
    with pytest.raises(RequestError) as error:
        params_of({"extra_body": fields, "temperature": 1.0})
    assert error.value.param == "extra_body"


# --- over HTTP ---

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
STATED: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 60),
    "max_completion_tokens": st.integers(1, 60),
    "thinking_token_budget": st.integers(0, 40),
    "min_thinking_tokens": st.integers(0, 600),
    "answer_reserve": st.integers(0, 600),
    "thinking_checkpoints": st.lists(st.integers(0, 40), max_size=2),
    "num_waits": st.integers(0, 2),
    "min_tokens": st.integers(0, 60),
    "temperature": st.sampled_from([0, -1]),
    "enable_thinking": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low"]),
    "thinking": st.fixed_dictionaries(
        {"type": st.sampled_from(["enabled", "disabled"])}, optional={"budget_tokens": st.just(9)}
    ),
}


@settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.fixed_dictionaries({}, optional=STATED))
def test_no_error_blames_a_field_that_was_not_sent(served: Served, fields: dict[str, Any]) -> None:
    for path, prompt in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "a=1"})):
        sent = {**prompt, **fields}
        answer = served.http.post(path, json={"deadline_ms": 0, **sent})
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] in sent, answer.text


def test_max_tokens_beyond_the_context_is_lowered_visibly(served: Served) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "a=1"})):
        limit = served.http.get("/v1/models").json()["data"][0]["max_model_len"]
        name = "max_completion_tokens" if path == CHAT else "max_tokens"
        answer = served.http.post(path, json={**body, name: 32000, "temperature": 0, "stop": "\n"})
        assert answer.status_code == 200
        left = limit - answer.json()["usage"]["prompt_tokens"]
        assert answer.headers["x-s1engine-lowered"] == f"{name}={left}"
        plain = served.http.post(path, json={**body, name: left, "temperature": 0, "stop": "\n"})
        assert plain.json()["choices"] == answer.json()["choices"]
        assert "x-s1engine-lowered" not in plain.headers


@pytest.mark.parametrize("limit", range(1, 9))
@pytest.mark.parametrize("fields", [{}, {"reasoning_effort": "low"}, {"thinking_budget": 99}])
def test_a_few_tokens_end_with_length(served: Served, limit: int, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": limit, "temperature": 0, **fields}
    answer = served.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == limit
