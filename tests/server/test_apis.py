"""Responses and messages return what a chat returns, whole and streamed."""

import json
from typing import Any

import pytest

from tests.server.conftest import KEY, Served

QUESTION = "a=3 b=a+4 c=b*2 c?"
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 200}
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    MESSAGES: CHAT,
    RESPONSES: {"input": QUESTION, "temperature": 0, "max_output_tokens": 200},
}


def post(served: Served, path: str, body: dict[str, Any], **headers: str) -> Any:
    answer = served.http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    with served.http.stream("POST", path, json={**body, "stream": True}) as answer:
        for block in "".join(answer.iter_text()).strip().split("\n\n"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def test_a_message_is_the_chats_answer_in_blocks(served: Served) -> None:
    chat = post(served, "/v1/chat/completions", CHAT)["choices"][0]["message"]
    got = post(served, MESSAGES, {**CHAT, "system": None})
    assert [block["type"] for block in got["content"]] == ["thinking", "text"]
    assert got["content"][0]["thinking"] == chat["reasoning"]
    assert got["content"][1]["text"] == chat["content"]
    assert (got["role"], got["stop_reason"]) == ("assistant", "end_turn")
    streamed = events(served, MESSAGES, CHAT)
    kinds = [event["type"] for event in streamed]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks: dict[int, str] = {}
    for event in streamed:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            text = delta.get("thinking", "") + delta.get("text", "")
            blocks[event["index"]] = blocks.get(event["index"], "") + text
    assert blocks == {0: chat["reasoning"], 1: chat["content"]}
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert streamed[-2]["usage"]["output_tokens"] == got["usage"]["output_tokens"]


def test_a_messages_budget_is_exact_and_its_stop_is_named(served: Served) -> None:
    budget = {"thinking": {"type": "enabled", "budget_tokens": 7}}
    got = post(served, MESSAGES, {**CHAT, **budget})
    assert got["usage"]["thinking"]["tokens"] == 7
    assert got["usage"]["thinking"]["end_reason"] == "budget"
    got = post(served, MESSAGES, {**CHAT, "thinking": {"type": "disabled"}})
    *opened, text = got["content"]  # s1-nano may open thinking itself
    assert text["type"] == "text" and "think" not in text["text"]
    assert [block["type"] for block in opened] in ([], ["thinking"])
    got = post(served, MESSAGES, {**CHAT, **budget, "stop_sequences": ["Answer"]})
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", "Answer")
    blocks = [{"type": "text", "text": QUESTION}]
    got = post(served, MESSAGES, {**CHAT, "messages": [{"role": "user", "content": blocks}]})
    assert got["content"][1]["text"].startswith("Final Answer")


def test_messages_take_the_key_in_their_own_header(served: Served) -> None:
    got = post(served, MESSAGES, CHAT, **{"Authorization": "", "x-api-key": KEY})
    assert got["type"] == "message"
    headers = {"Authorization": "", "x-api-key": "wrong"}
    assert served.http.post(MESSAGES, json=CHAT, headers=headers).status_code == 401


def test_a_response_through_the_clients_own_types(served: Served) -> None:
    body = BODIES[RESPONSES]
    chat = post(served, "/v1/chat/completions", CHAT)["choices"][0]["message"]
    got = served.client.responses.create(model="s1-nano", **body)
    assert got.output_text == chat["content"] and got.status == "completed"
    assert got.output[0].type == "reasoning" and got.output[0].content is not None
    assert got.output[0].content[0].text == chat["reasoning"]
    assert got.usage is not None and got.usage.output_tokens_details.reasoning_tokens > 0
    texts = {"response.reasoning_text.delta": "", "response.output_text.delta": ""}
    numbers = []
    for event in served.client.responses.create(model="s1-nano", stream=True, **body):
        numbers.append(event.sequence_number)  # type: ignore[union-attr]
        if event.type in texts:
            texts[event.type] += event.delta  # type: ignore[union-attr]
    assert list(texts.values()) == [chat["reasoning"], chat["content"]]
    assert event.type == "response.completed" and event.response.output_text == chat["content"]
    assert numbers == list(range(len(numbers)))


def test_a_response_is_cut_and_says_so(served: Served) -> None:
    body = {**BODIES[RESPONSES], "max_output_tokens": 40, "reasoning": {"effort": "low"}}
    got = post(served, RESPONSES, {**body, "num_waits": 9, "answer_reserve": 1})
    assert got["usage"]["output_tokens"] <= 40
    turns = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": QUESTION},
    ]
    assert post(served, RESPONSES, {**BODIES[RESPONSES], "input": turns})["output"]


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (MESSAGES, {"max_tokens": 0}, "max_tokens"),
        (MESSAGES, {"messages": []}, "messages"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": -2}}, "thinking"),
        (MESSAGES, {"thinkingBudget": 1}, "thinkingBudget"),
        (RESPONSES, {"previous_response_id": "x"}, "previous_response_id"),
        (RESPONSES, {"input": [{"type": "image"}]}, "input"),
        (RESPONSES, {"text": {"format": {"type": "wizard"}}}, "text.format"),
        (RESPONSES, {"timeout": 0}, "timeout"),
    ],
)
def test_bad_fields_are_named(
    served: Served, path: str, change: dict[str, Any], param: str
) -> None:
    answer = served.http.post(path, json={**BODIES[path], **change})
    assert answer.status_code == 400, answer.text
    assert param in json.dumps(answer.json()["error"])


def test_request_ids_are_echoed_or_made(served: Served) -> None:
    given = served.http.get("/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = {served.http.get("/version").headers["x-request-id"] for _ in range(2)}
    odd = served.http.get("/version", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert len(made) == 2 and all(len(name) == 32 for name in (*made, odd))


def test_a_request_that_takes_too_long_is_ended(served: Served) -> None:
    body = {**CHAT, "max_tokens": 1900, "ignore_eos": True, "timeout": 0.001}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"
    begun = {**body, "stream": True, "timeout": 0.2}  # while tokens come, not before
    with served.http.stream("POST", "/v1/chat/completions", json=begun) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert "request_timeout" in lines[-2] and lines[-1] == "data: [DONE]"


def test_a_huge_head_is_refused(served: Served) -> None:
    import socket
    from urllib.parse import urlsplit

    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        try:
            for _ in range(300):
                connection.sendall(b"X-Filler: " + b"x" * 8000 + b"\r\n")
            answer = connection.recv(100)
        except OSError:
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 200")
    assert served.http.get("/health").status_code == 200


def test_a_deadline_ends_a_request_in_every_api(served: Served) -> None:
    """With the output so far; clients see what they know of max_tokens."""
    now = {"deadline_ms": 0}
    chat = post(served, "/v1/chat/completions", {**CHAT, **now, "n": 2})
    assert [choice["finish_reason"] for choice in chat["choices"]] == ["length"] * 2
    text = post(served, "/v1/completions", {"prompt": QUESTION, "first_token_deadline_ms": 0})
    assert text["choices"][0]["finish_reason"] == "length"
    assert post(served, MESSAGES, {**CHAT, **now})["stop_reason"] == "max_tokens"
    response = post(served, RESPONSES, {**BODIES[RESPONSES], **now})
    assert response["status"] == "incomplete"
    with served.http.stream(
        "POST", "/v1/chat/completions", json={**CHAT, **now, "stream": True}
    ) as answer:
        assert '"finish_reason":"length"' in "".join(answer.iter_text())
    for name in ("deadline_ms", "first_token_deadline_ms"):
        refused = served.http.post("/v1/chat/completions", json={**CHAT, name: -1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name
