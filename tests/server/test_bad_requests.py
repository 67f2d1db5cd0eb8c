"""Bad input gets an OpenAI error object with the field's name and harms no other request."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from s1engine.server.middleware import BodyLimit
from tests.server.conftest import Served

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HELLO = [{"role": "user", "content": "a=1 a?"}]
CANARY = {"messages": HELLO, "min_thinking_tokens": 100, "num_waits": 8, "max_tokens": 400}

# path, what is added to a good body, the field that the error names
BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"thinking_tokens_budget": 1}, "thinking_tokens_budget"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 2**20}]}, "messages"),
    (CHAT, {"temperature": float("nan")}, "temperature"),
    (CHAT, {"temperature": float("inf")}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_k": 2**40}, "top_k"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 10**9}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 3, "answer_reserve": 1}, "max_tokens"),
    (CHAT, {"max_tokens": 2**63}, "max_tokens"),
    (CHAT, {"max_tokens": 50, "max_completion_tokens": 60}, "max_completion_tokens"),
    (CHAT, {"seed": 2**70}, "seed"),
    (CHAT, {"priority": 2**40}, "priority"),
    (CHAT, {"cache_salt": ""}, "cache_salt"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 1}, "top_logprobs"),
    (CHAT, {"logit_bias": {"999999": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 1e9}}, "logit_bias"),
    (CHAT, {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": ["x"] * 100}, "stop"),
    (CHAT, {"thinking_token_budget": -2}, "thinking_token_budget"),
    (CHAT, {"thinking_token_budget": 1.5}, "thinking_token_budget"),
    (CHAT, {"thinking_token_budget": 5, "min_thinking_tokens": 6}, "min_thinking_tokens"),
    (CHAT, {"min_thinking_tokens": 5000}, "min_thinking_tokens"),
    (CHAT, {"answer_reserve": 5000}, "answer_reserve"),
    (CHAT, {"num_waits": 10**6}, "num_waits"),
    (CHAT, {"wait_text": "x" * 10**5}, "wait_text"),
    (CHAT, {"wait_text": "\ud800"}, "wait_text"),
    (CHAT, {"thinking_budget": 1, "max_thinking_tokens": 2}, "max_thinking_tokens"),
    (CHAT, {"thinking": {"type": "maybe"}}, "thinking"),
    (CHAT, {"thinking_checkpoints": [9, 3]}, "thinking_checkpoints"),
    (CHAT, {"thinking_checkpoints": list(range(99))}, "thinking_checkpoints"),
    (CHAT, {"thinking_early_exit": 2}, "thinking_early_exit"),
    (CHAT, {"thinking_loop_repeats": 0}, "thinking_loop_repeats"),
    (CHAT, {"reasoning_effort": "heroic"}, "reasoning_effort"),
    (CHAT, {"enable_thinking": False, "num_waits": 1}, "enable_thinking"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False, "x": {}}}, "chat_template_kwargs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"stream_options": {"include_usages": 1}}, "stream_options"),
    (COMPLETION, {"prompt": ""}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": [5, 10**6]}, "prompt"),
    (COMPLETION, {"prompt": [-5]}, "prompt"),
    (COMPLETION, {"prompt": [["x"]]}, "prompt"),
    (COMPLETION, {"prompt": ["x"] * 1000}, "prompt"),
    (COMPLETION, {"logprobs": 30}, "logprobs"),
    (COMPLETION, {"echo": 1}, "echo"),
    (COMPLETION, {"suffix": "x"}, "suffix"),
    (COMPLETION, {"best_of": 4}, "best_of"),
    ("/tokenize", {"prompt": None}, "prompt"),
    ("/tokenize", {"messages": HELLO}, "prompt"),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
]
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETION: {"prompt": "a=1"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture(scope="module", autouse=True)
def canary(served: Served) -> Iterator[None]:
    """Repeats one request beside all bad ones; its answer must never change."""
    answers: list[str] = []
    stop = threading.Event()

    def sing() -> None:
        with httpx.Client(base_url=served.url, headers=served.http.headers, timeout=60) as http:
            while not stop.is_set():
                answers.append(http.post(CHAT, json=CANARY).json()["choices"][0]["message"])

    thread = threading.Thread(target=sing)
    alone = served.http.post(CHAT, json=CANARY).json()["choices"][0]["message"]
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert len(answers) > 1 and all(answer == alone for answer in answers)


def post(served: Served, path: str, body: str | bytes) -> httpx.Response:
    return served.http.post(path, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("path", "fields", "param"), BAD)
def test_a_bad_field_is_named(
    served: Served, path: str, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True) if path in (CHAT, COMPLETION) else (False,):
        body = {**GOOD[path], **fields, **({"stream": True} if stream else {})}
        answer = post(served, path, json.dumps(body))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
        assert str(error["param"]).partition("[")[0] == param.partition("[")[0], error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"messages":' * 50_000],
    ids=["empty", "cut", "list", "null", "text", "bytes", "deep list", "deep object"],
)
def test_a_body_that_is_not_an_object_is_refused(served: Served, body: bytes) -> None:
    answer = post(served, CHAT, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_too_long_a_prompt_has_its_code(served: Served) -> None:
    answer = post(served, COMPLETION, json.dumps({"prompt": "a " * 5000}))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_models_routes_and_methods(served: Served) -> None:
    answer = post(served, CHAT, json.dumps({"messages": HELLO, "model": "gpt"}))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert served.http.get("/v1/models/gpt").status_code == 404
    for answer in (served.http.get("/v1/nothing"), served.http.get(CHAT)):
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]


def test_a_huge_body_is_refused(served: Served) -> None:
    answer = post(served, CHAT, b'{"messages": "' + b"x" * (33 * 2**20) + b'"}')
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_body_that_grows_beyond_the_limit_is_cut_off() -> None:
    import asyncio

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"taken"})

    async def run(chunks: int) -> list[Any]:
        left = chunks
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": b"x" * 10, "more_body": left > 0}

        async def send(message: Any) -> None:
            sent.append(message)

        await BodyLimit(app, max_bytes=50)({"type": "http", "headers": []}, receive, send)
        return sent

    assert [m.get("status", m.get("body")) for m in asyncio.run(run(5))] == [200, b"taken"]
    refused = asyncio.run(run(6))
    assert [m["status"] for m in refused if "status" in m] == [413]
