"""Fields that an API does not declare: inert and neutral ones pass, others are never lost."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from s1engine.cli.request_row import Row
from s1engine.errors import RequestError
from s1engine.server.api.anthropic import MessagesRequest
from s1engine.server.api.body import RequestBody
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.completions import CompletionRequest
from s1engine.server.api.field_rules import INERT, MEANINGFUL, UNSUPPORTED, same
from s1engine.server.api.request_fields import GenerationFields, HttpFields
from s1engine.server.api.responses import ResponsesRequest
from s1engine.server.api.thinking_fields import ThinkingFields
from s1engine.server.api.tokenization import DetokenizeRequest, TokenizeRequest
from s1engine.server.middleware import NotesHeaders
from s1engine.server.request_notes import (
    MAX_LOGGED_NAMES,
    MAX_NAME_CHARS,
    MAX_UNKNOWN_FIELDS,
    NOTES,
    RequestNotes,
)
from tests.server.conftest import Served

HELLO = [{"role": "user", "content": "a=1 a?"}]
BODIES: dict[type[RequestBody], dict[str, Any]] = {
    ChatRequest: {"messages": HELLO},
    CompletionRequest: {"prompt": "a"},
    MessagesRequest: {"messages": HELLO, "max_tokens": 9},
    ResponsesRequest: {"input": "a"},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [5]},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
bodies = st.sampled_from(list(BODIES))


@contextmanager
def notes_of(*, strict: bool = False) -> Iterator[RequestNotes]:
    """The notes of a request, as the middleware opens them."""
    notes = RequestNotes(strict=strict)
    token = NOTES.set(notes)
    try:
        yield notes
    finally:
        NOTES.reset(token)


def refused(
    body: type[RequestBody], fields: dict[str, Any], *, strict: bool = False
) -> RequestError:
    with notes_of(strict=strict), pytest.raises(ValidationError) as raised:
        body.model_validate({**BODIES[body], **fields})
    error = raised.value.errors()[0]["ctx"]["error"]
    assert isinstance(error, RequestError)
    return error


@given(bodies, st.data())
def test_null_and_inert_fields_change_nothing(body: type[RequestBody], data: st.DataObject) -> None:
    names = sorted(body.declared | INERT | set(UNSUPPORTED) | {"wholly_new"})
    nulls: dict[str, Any] = dict.fromkeys(data.draw(st.sets(st.sampled_from(names))))
    inert = data.draw(st.dictionaries(st.sampled_from(sorted(INERT - body.declared)), JSON))
    with notes_of(strict=True) as notes:
        plain = body.model_validate(BODIES[body])
        assert body.model_validate({**nulls, **inert, **BODIES[body]}) == plain
    assert not notes.ignored


@given(bodies, st.sampled_from(sorted(UNSUPPORTED)), JSON)
def test_known_fields_pass_with_values_that_ask_for_nothing(
    body: type[RequestBody], name: str, value: Any
) -> None:
    if name in body.declared:
        return
    with notes_of(strict=True):
        plain = body.model_validate(BODIES[body])
        for neutral in UNSUPPORTED[name]:
            assert body.model_validate({**BODIES[body], name: neutral}) == plain
    if value not in (None, "", [], {}) and not any(same(value, n) for n in UNSUPPORTED[name]):
        error = refused(body, {name: value})
        assert error.param == name and name in str(error)


def test_one_is_not_true() -> None:
    assert same(1, 1.0) and not same(1, True) and not same(0, False)


def misspelt(data: st.DataObject, name: str) -> str:
    """The name in another case, or with a letter dropped, doubled or swapped."""
    words = name.split("_")
    at = data.draw(st.integers(1, len(name) - 2))
    return data.draw(
        st.sampled_from(
            [
                words[0] + "".join(word.title() for word in words[1:]),
                name.replace("_", "-"),
                name.upper(),
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
    )


@given(bodies, st.sampled_from(sorted(MEANINGFUL)), st.data())
def test_a_misspelt_field_is_never_ignored(
    body: type[RequestBody], name: str, data: st.DataObject
) -> None:
    if len(name) < 8:
        return
    wrong = misspelt(data, name)
    if wrong in body.declared | set(UNSUPPORTED) | body.rules.inert:
        return
    error = refused(body, {wrong: 1})
    assert error.param == wrong and ("did you mean" in str(error) or wrong == name)


def test_a_field_of_another_object_is_refused() -> None:
    for body, name in ((DetokenizeRequest, "num_waits"), (MessagesRequest, "num_wait")):
        assert refused(body, {name: 1}).param == name
    with notes_of(strict=True):
        TokenizeRequest.model_validate({"prompt": "a", "temperature": 1, "max_tokens": 9})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("thinkingTokenBudget", "thinking_token_budget"),
        ("max_thinking_token", "max_thinking_tokens"),
        ("temp_erature", "temperature"),
        ("thinking_enabled", "enable_thinking"),
        ("topP", "top_p"),
        ("N", "n"),
    ],
)
def test_the_right_name_is_suggested(wrong: str, right: str) -> None:
    assert f"did you mean {right}?" in str(refused(ChatRequest, {wrong: 1}))


@pytest.mark.parametrize("name", ["thinkingConfig", "extra_reasoning", "tokenBudgetX", "thought"])
def test_a_name_of_thinking_is_never_ignored(name: str) -> None:
    assert refused(ChatRequest, {name: 1}).param == name


def test_all_fields_of_sampling_and_thinking_are_meaningful() -> None:
    not_about_output = {"chat_template_kwargs"}
    ours = set(GenerationFields.model_fields) | set(ThinkingFields.model_fields)
    assert ours - MEANINGFUL <= not_about_output
    assert not (MEANINGFUL | set(HttpFields.model_fields)) & INERT


def test_nested_objects_have_the_rule_too() -> None:
    good: dict[str, Any] = {
        "stream_options": {"include_obfuscation": True, "include_usage": None},
        "reasoning": {"effort": "low", "summary": "auto", "exclude": False},
        "tools": [{"type": "function", "function": {"name": "f", "x": 1}, "cache_control": {}}],
        "response_format": {"type": "text", "y": 1},
    }
    with notes_of() as notes:
        ChatRequest.model_validate({"messages": HELLO, **good})
    assert list(notes.ignored) == ["response_format.y"]
    for fields, name in (
        ({"thinking": {"type": "enabled", "budgetTokens": 1}}, "thinking.budget_tokens"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usage"),
        ({"stream_options": {"temp_erature": 1}}, "temperature"),
    ):
        error = refused(ChatRequest, fields)
        assert error.param == next(iter(fields)) and f"did you mean {name}?" in str(error)
    assert refused(ChatRequest, {"reasoning": {"exclude": True}}).param == "reasoning"


def test_strict_fields_and_too_many() -> None:
    assert refused(ChatRequest, {"wholly_new": 1}, strict=True).param == "wholly_new"
    many = {f"wholly_new_{i}": i for i in range(MAX_UNKNOWN_FIELDS + 1)}
    assert "unknown fields" in str(refused(ChatRequest, many))


def test_the_log_names_a_field_once(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        NOTES.get().ignored.update(dict.fromkeys(scope["names"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        pass

    async def receive() -> Any:
        raise AssertionError

    async def ask(count: int) -> None:
        for _ in range(2):
            names = [f"new{i}" for i in range(count)]
            await middleware({"type": "http", "path": "/x", "names": names}, receive, send)

    middleware = NotesHeaders(app)
    with caplog.at_level(logging.WARNING, "s1engine.server.middleware"):
        asyncio.run(ask(2))
        assert [record.args for record in caplog.records] == [
            (f"ignored unknown field new{i}", "/x") for i in range(2)
        ]
        asyncio.run(ask(MAX_LOGGED_NAMES + 5))
    assert len(caplog.records) == MAX_LOGGED_NAMES


def test_rows_of_a_file_are_strict() -> None:
    Row.model_validate({"prompt": "a", "user": "u", "best_of": 1, "seed": None})
    with pytest.raises(ValidationError, match="unknown field 'wholly_new'"):
        Row.model_validate({"prompt": "a", "wholly_new": 1})


@given(st.lists(st.text(min_size=1, max_size=99), min_size=1, max_size=5))
def test_names_are_safe_in_headers(names: list[str]) -> None:
    notes = RequestNotes(strict=False)
    notes.ignored.update(dict.fromkeys(names))
    ((name, value),) = notes.headers()
    assert name == b"x-s1engine-ignored"
    assert re.fullmatch(rb"[A-Za-z0-9_.\[\]?, -]+", value)
    assert len(value) <= len(notes.ignored) * (MAX_NAME_CHARS + 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
        ("/tokenize", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HELLO, "temperature": -1}),
    ],
)
def test_ignored_fields_are_named_in_every_response(
    served: Served, path: str, body: dict[str, Any], stream: bool
) -> None:
    fields = {"wholly_new": {"x": 1}, "another one\n": 2, **({"stream": True} if stream else {})}
    if path == "/tokenize" and stream:
        return
    answer = served.http.post(path, json={**body, **fields})
    assert answer.status_code == (400 if "temperature" in body else 200), answer.text
    assert answer.headers["x-s1engine-ignored"] == "wholly_new, another?one?"
    plain = served.http.post(path, json=body)
    assert "x-s1engine-ignored" not in plain.headers


@pytest.mark.parametrize("final", [False, True])
def test_usage_in_each_chunk_grows_to_the_whole(served: Served, final: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": final}
    body = {"messages": HELLO, "max_tokens": 60, "n": 2, "seed": 1}
    whole = served.http.post("/v1/chat/completions", json=body).json()["usage"]
    body |= {"stream": True, "stream_options": options}
    lines = served.http.post("/v1/chat/completions", json=body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert {name: chunks[-1]["usage"][name] for name in names} == {n: whole[n] for n in names}
    assert any(not chunk["choices"] for chunk in chunks) is final
