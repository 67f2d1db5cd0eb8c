"""What a server adds to requests that say little: defaults of thinking, effort, continued turns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from s1engine.errors import RequestError
from s1engine.server.api.anthropic import MessagesRequest
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.responses import ResponsesRequest
from tests.server.conftest import Served, start_server
from tests.tiny_tokenizer import TEMPLATE

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETION: {"prompt": "<|im_start|>user\na=1 a?<|im_end|>\n<|im_start|>think"},
    MESSAGES: {"messages": HELLO},
    RESPONSES: {"input": HELLO[0]["content"]},
}
LIMIT = {RESPONSES: "max_output_tokens"}


def body_of(path: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    limit = LIMIT.get(path, "max_tokens")
    return {**BODIES[path], "temperature": 0, limit: max_tokens, **fields}


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ends(path: str, answer: dict[str, Any]) -> Any:
    if path == MESSAGES:
        return answer["stop_reason"]
    return answer["status"] if path == RESPONSES else answer["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [(CHAT, "length"), (COMPLETION, "length"), (MESSAGES, "max_tokens"), (RESPONSES, "incomplete")],
)
def test_one_token_is_a_legal_probe(served: Served, path: str, reason: str) -> None:
    answer = post(served.http, path, body_of(path, 1))
    assert ends(path, answer) == reason
    used = answer["usage"]
    assert used.get("completion_tokens", used.get("output_tokens")) == 1
    assert used["thinking"]["tokens"] == 1
    with served.http.stream("POST", path, json=body_of(path, 1, stream=True)) as stream:
        assert stream.status_code == 200 and f'"{reason}"' in "".join(stream.iter_text())


# --- flags ---


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with defaults, a maximum, and a template that shows the effort."""
    template: Path = tmp_path_factory.mktemp("template") / "effort.jinja"
    template.write_text("{{ reasoning_effort | default('unset') }}" + TEMPLATE)
    flags = {
        "default-thinking-token-budget": 6,
        "default-num-waits": 1,
        "max-thinking-token-budget": 9,
        "chat-template": template,
        "dtype": "float32",
    }
    names = ("--strict-fields", "--served-model-name", "org/first", "second")
    process, url, _ = start_server(*(f"--{name}={value}" for name, value in flags.items()), *names)
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, 6),
        ({"thinking_token_budget": 4}, 4),
        ({"thinking_token_budget": 400}, 9),
        ({"reasoning_effort": "xhigh"}, 9),
        ({"reasoning_effort": "low", "thinking_token_budget": 3}, 3),
        ({"max_tokens_thinking": "auto"}, 9),
    ],
)
def test_defaults_and_maximum_hold_in_every_api(
    limited: httpx.Client, path: str, fields: dict[str, Any], budget: int
) -> None:
    used = post(limited, path, body_of(path, 200, **fields))["usage"]["thinking"]
    assert used["budget"] == budget and used["tokens"] <= budget


def test_defaults_leave_requests_alone_that_do_not_think(limited: httpx.Client) -> None:
    answer = post(limited, CHAT, body_of(CHAT, 20, enable_thinking=False))
    assert answer["choices"][0]["thinking"] is None
    answer = post(limited, COMPLETION, {"prompt": "a=1", "max_tokens": 5})
    assert answer["choices"][0]["thinking"] is None


def tokens(http: httpx.Client, **fields: Any) -> str:
    ids = post(http, "/tokenize", fields)["tokens"]
    return str(post(http, "/detokenize", {"tokens": ids})["prompt"])


def test_the_effort_reaches_the_template(limited: httpx.Client) -> None:
    plain = post(limited, CHAT, body_of(CHAT, 1))["usage"]["prompt_tokens"]
    kwargs = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    for fields in (
        {"reasoning_effort": "high"},
        {"reasoning": {"effort": "high"}},
        {"reasoning_effort": "high", "thinking_token_budget": 5},
        kwargs,
    ):
        used = post(limited, CHAT, body_of(CHAT, 60, **fields))["usage"]
        assert used["prompt_tokens"] == plain - len("unset") + len("high"), fields
    assert tokens(limited, messages=HELLO, **kwargs).startswith("high")
    body = body_of(CHAT, 60, reasoning_effort="low", **kwargs)
    answer = limited.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_strict_fields_refuse_unknown_ones(limited: httpx.Client) -> None:
    post(limited, CHAT, body_of(CHAT, 1, user="u", best_of=1, tools=None, wholly_new=None))
    for path in (*BODIES, "/tokenize"):
        body = {"prompt": "a"} if path == "/tokenize" else body_of(path, 1)
        answer = limited.post(path, json={**body, "wholly_new": 1})
        assert answer.status_code == 400 and "wholly_new" in answer.text


def test_a_model_has_several_names(limited: httpx.Client) -> None:
    for name in ("org/first", "second", None):
        assert post(limited, CHAT, body_of(CHAT, 1, model=name))["model"] == "org/first"
        assert post(limited, "/tokenize", {"prompt": "a", "model": name})["count"] == 1
    models = limited.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["org/first", "second"]
    assert limited.get("/v1/models/org/first").json()["id"] == "org/first"
    answer = limited.post(CHAT, json=body_of(CHAT, 1, model="s1-nano"))
    assert answer.status_code == 404 and "org/first, second" in answer.json()["error"]["message"]


# --- turns ---


def test_a_begun_answer_is_continued_in_every_api(served: Served) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Final Answer: c="}]
    raw = tokens(served.http, messages=begun)
    assert raw.endswith("assistant\nFinal Answer: c=")
    expected = post(served.http, COMPLETION, {"prompt": raw, "temperature": 0, "max_tokens": 8})
    text = expected["choices"][0]["text"]
    chat = post(served.http, CHAT, body_of(CHAT, 8, messages=begun))["choices"][0]
    assert chat["message"]["content"] == text and chat["thinking"] is None
    blocks = post(served.http, MESSAGES, body_of(MESSAGES, 8, messages=begun))["content"]
    assert [block.get("text") for block in blocks] == [text]
    items = post(served.http, RESPONSES, body_of(RESPONSES, 8, input=begun))["output"]
    assert items[0]["content"][0]["text"] == text
    fresh = tokens(served.http, messages=begun, continue_final_message=False)
    assert fresh.endswith("c=<|im_end|>\n<|im_start|>assistant\n<|im_start|>think")
    closed = tokens(
        served.http, messages=begun, add_generation_prompt=False, continue_final_message=False
    )
    assert closed.endswith("c=<|im_end|>\n")


def test_what_cannot_be_continued_is_refused(served: Served) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "c="}]
    for fields, param in (
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": begun, "thinking_token_budget": 5}, "thinking_token_budget"),
        (
            {"messages": begun, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ):
        answer = served.http.post(CHAT, json=body_of(CHAT, 60, **fields))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_tokenize_has_the_fields_of_vllm(served: Served) -> None:
    both = [
        post(served.http, "/tokenize", {"prompt": "a=1", "add_special_tokens": flag})["tokens"]
        for flag in (True, False)
    ]
    assert both[0] == both[1]  # the bundled tokenizer adds none
    answer = post(served.http, "/tokenize", {"prompt": "a=1 b", "return_token_strs": True})
    assert len(answer["token_strs"]) == answer["count"] == len(answer["tokens"])
    assert "".join(answer["token_strs"]).replace("\u0120", " ") == "a=1 b"
    assert "token_strs" not in post(served.http, "/tokenize", {"prompt": "a"})
    refused = served.http.post("/tokenize", json={"messages": HELLO, "add_special_tokens": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "add_special_tokens"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking_token_budget": 9},
    ],
)
def test_tokenize_counts_what_a_chat_computes(served: Served, fields: dict[str, Any]) -> None:
    count = post(served.http, "/tokenize", {"messages": HELLO, **fields})["count"]
    used = post(served.http, CHAT, body_of(CHAT, 40, **fields))["usage"]
    assert used["prompt_tokens"] == count


# --- earlier thinking ---

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def assistants(chat: ChatRequest) -> list[dict[str, Any]]:
    return [turn for turn in chat.messages if turn["role"] == "assistant"]


def test_blocks_of_thinking_become_reasoning() -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "Hm ", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "so."},
        {"type": "text", "text": "I call."},
        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
    ]
    body = {"max_tokens": 9, "messages": [*HELLO, {"role": "assistant", "content": blocks}]}
    (turn,) = assistants(MessagesRequest.model_validate(body).to_chat())
    assert (turn["reasoning_content"], turn["content"]) == ("Hm so.", "I call.")
    assert turn["tool_calls"][0]["function"]["name"] == "f"
    blocks[0]["thinking"] = 5
    with pytest.raises(RequestError, match="thinking must be text"):
        MessagesRequest.model_validate(body).to_chat()


def test_reasoning_items_join_what_follows_them() -> None:
    def thought(text: str, key: str = "content") -> dict[str, Any]:
        return {"type": "reasoning", key: [{"type": "reasoning_text", "text": text}]}

    items = [
        HELLO[0],
        thought("one"),
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
        thought("two", "summary"),
        {"role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
        thought("dropped"),
        HELLO[0],
        {"role": "assistant", "content": "y"},
    ]
    turns = assistants(ResponsesRequest.model_validate({"input": items}).to_chat())
    assert [turn.get("reasoning_content") for turn in turns] == ["one", "two", None]
    assert turns[0]["tool_calls"] == [CALL | {"function": {"name": "f", "arguments": "{}"}}]
    for bad in (5, [5], [{"text": 5}]):
        items[1]["content"] = bad
        with pytest.raises(RequestError) as error:
            ResponsesRequest.model_validate({"input": items}).to_chat()
        assert str(error.value.param).startswith("input[1].content")


def test_a_response_sent_back_keeps_its_thinking(served: Served) -> None:
    """The items of a response, as the API returned them, are input of the next one."""
    first = post(served.http, RESPONSES, body_of(RESPONSES, 200))
    kept = ("type", "role", "content", "summary")
    items = [{name: item[name] for name in kept if name in item} for item in first["output"]]
    chat = ResponsesRequest.model_validate({"input": json.loads(json.dumps(items))}).to_chat()
    (turn,) = assistants(chat)
    assert turn["reasoning_content"] == first["output"][0]["content"][0]["text"]
