"""Bodies of any shape within the limit are answered at once, and never by a server error."""

import json
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.conftest import Target

SIZE = 2**20
HELLO = [{"role": "user", "content": "a=1 a?"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4},
    "/v1/completions": {"prompt": "a=1", "max_tokens": 4},
    "/v1/messages": {"messages": HELLO, "max_tokens": 40},
    "/v1/responses": {"input": "a=1 a?", "max_output_tokens": 40},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
FIELDS = (
    *("messages", "prompt", "input", "tokens", "stop", "stop_token_ids", "metadata", "tools"),
    *("logit_bias", "thinking_checkpoints", "system", "include", "stop_sequences", "thinking"),
    *("structured_outputs", "response_format", "chat_template_kwargs", "unknown"),
)
SCALARS = ("1", '"a"', "null", "true", "1e999", "9" * 30, '"\\ud800"')
VALUES = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(lambda items: f"[{','.join(items)}]"),
        inner.map(lambda item: f'{{"type":"text","text":{item}}}'),
        inner.map(lambda item: f'{{"role":"user","content":{item}}}'),
    ),
    max_leaves=3,
)


def repeated(value: str, size: int) -> str:
    """A list of as many copies as fit."""
    return f"[{','.join([value] * (size // (len(value) + 1)))}]"


def numbered(value: str, size: int) -> str:
    """An object with as many fields as fit."""
    count = size // (len(value) + 10)
    return "{" + ",".join(f'"{i}":{value}' for i in range(count)) + "}"


LARGE = st.builds(
    lambda build, value: build(value, SIZE), st.sampled_from((repeated, numbered)), VALUES
)
NESTED = st.builds(
    lambda outer, large: outer.replace("?", large),
    st.sampled_from(("?", '[{"role":"user","content":?}]', '[{"type":?}]', '{"json":?}', "[?]")),
    LARGE,
)


def send(target: Target, path: str, field: str, value: str) -> int:
    good = json.dumps({name: v for name, v in GOOD[path].items() if name != field})
    body = f"{good[:-1]}{', ' if len(good) > 2 else ''}{json.dumps(field)}: {value}}}"
    return target.http.post(path, content=body.encode()).status_code


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(path=st.sampled_from(list(GOOD)), field=st.sampled_from(FIELDS), value=NESTED)
def test_a_large_field_delays_no_one(target: Target, path: str, field: str, value: str) -> None:
    with target.watched():
        assert send(target, path, field, value) < 500


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(list(GOOD)), field=st.sampled_from(FIELDS), value=VALUES)
def test_no_field_is_a_server_error(target: Target, path: str, field: str, value: str) -> None:
    assert send(target, path, field, value) < 500


def test_deep_and_broken_json_is_refused(target: Target) -> None:
    bodies = ["[" * SIZE, '{"a":' * 10**5, '{"messages": ', "", "null", "[]", '"a"', "9" * SIZE]
    with target.watched():
        for path in GOOD:
            for body in bodies:
                answer = target.http.post(path, content=body.encode())
                assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]


KEYS = st.one_of(
    st.sampled_from(("", "\x00", "\ud800", "1" * 5000, "-1", "\u0661", "1.5", "a" * 2**16)),
    st.text(max_size=8),
)
KEYED = ("logit_bias", "metadata", "chat_template_kwargs", "response_format", "structured_outputs")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(list(GOOD)), field=st.sampled_from((*KEYED, None)), key=KEYS)
def test_no_key_of_an_object_is_a_server_error(
    target: Target, path: str, field: str | None, key: str
) -> None:
    """An error does not send back all that it got."""
    body = {**GOOD[path], **({key: 1} if field is None else {field: {key: 1}})}
    answer = target.http.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500
    assert answer.status_code == 200 or len(answer.content) < 2000


HEADERS = ("X-Request-Id", "traceparent", "Authorization", "X-Api-Key", "Content-Type", "Accept")
BYTES = st.binary(max_size=12)
VALUES_OF_HEADERS = st.lists(st.integers(0x21, 0xFF).filter(lambda c: c != 0x7F)).map(bytes)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(HEADERS), value=VALUES_OF_HEADERS, path=BYTES, query=BYTES)
def test_no_head_is_a_server_error(
    target: Target, name: str, value: bytes, path: bytes, query: bytes
) -> None:
    escaped = quote(path), quote(query, safe="&=%")
    for method, url in (
        ("POST", "/v1/completions"),
        ("GET", f"/v1/models/{escaped[0]}?{escaped[1]}"),
        ("POST", f"/v1/requests/{escaped[0]}/end_thinking"),
        ("GET", f"/{escaped[0]}"),
    ):
        body = json.dumps(GOOD["/v1/completions"]).encode() if method == "POST" else None
        answer = target.http.request(method, url, content=body, headers=[(name.encode(), value)])
        assert answer.status_code < 500
