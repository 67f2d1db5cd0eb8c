"""Anthropic's API: blocks and the chat they become, counted tokens, streams, errors, tools."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.errors import RequestError
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput, ThinkingUsage, Timing, Usage
from s1engine.server.anthropic_errors import KINDS, rewrite
from s1engine.server.api.anthropic_blocks import to_messages
from s1engine.server.api.anthropic_formatter import MessagesFormatter
from s1engine.server.api.response_formatter import ResponseHead, error_object
from s1engine.server.api.tool_call_parser import ToolCallParser
from s1engine.server.app import create_app
from tests.server.conftest import KEY
from tests.server.test_tools import SCHEMA
from tests.server.tool_script import CHAT, TEMPLATE, Scripted

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
MARK = {"cache_control": {"type": "ephemeral"}}
Test = Callable[[httpx.AsyncClient, Scripted], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Test], None]]:
    """Runs a test with a bare client; one engine for all tests."""
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE)
    engine = AsyncLLMEngine(EngineConfig(dtype="float32", chat_template=str(path)))
    with asyncio.Runner() as runner:
        runner.run(engine.start())

        def run(test: Test) -> None:
            async def main() -> None:
                scripted = Scripted(engine)
                app: Any = create_app(scripted, api_keys=[KEY])  # type: ignore[arg-type]
                transport, headers = httpx.ASGITransport(app), {"x-api-key": KEY}
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://x", headers=headers
                ) as http:
                    await test(http, scripted)

            runner.run(main())

        yield run
        runner.run(engine.shutdown())


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = answer.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


# --- blocks ---


def test_turns_become_messages_with_thinking_beside_calls() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "add", "input": {"b": 1}, **MARK}
    thought = {"type": "thinking", "thinking": "Let me add.", "signature": "unsigned"}
    blocks = [thought, {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "So"}]
    assert to_messages("assistant", [*blocks, call], "m") == [
        {
            "role": "assistant",
            "content": "So",
            "reasoning_content": "Let me add.",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"b": 1}},
                }
            ],
        }
    ]
    document = {"type": "document", "title": "T", "source": {"type": "text", "data": "D"}, **MARK}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [document], "is_error": True}
    empty = {"type": "tool_result", "tool_use_id": "t2"}
    assert to_messages("user", [{"type": "text", "text": "Q", **MARK}, result, empty], "m") == [
        {"role": "tool", "tool_call_id": "t1", "content": "Error: T\nD\n"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "Q"},
    ]


@pytest.mark.parametrize(
    ("role", "block", "where"),
    [
        ("user", {"type": "image", "source": {}}, "m.content[1]"),
        ("user", {"type": "text", "text": None}, "m.content[1].text"),
        ("user", "x", "m.content[1]"),
        ("user", {"type": "tool_result", "tool_use_id": "t", "content": 3}, "m.content[1].content"),
        ("assistant", {"type": "tool_use", "id": "t", "name": 3}, "m.content[1].name"),
        ("assistant", {"type": "tool_use", "id": "t", "name": "f", "input": 3}, "m.content[1].inp"),
        ("assistant", {"type": "thinking", "thinking": 3}, "m.content[1].thinking"),
        ("assistant", {"type": "server_tool_use"}, "m.content[1]"),
    ],
)
def test_errors_name_the_block(role: str, block: Any, where: str) -> None:
    with pytest.raises(RequestError) as error:
        to_messages(role, [{"type": "text", "text": "a"}, block], "m")
    assert str(error.value).startswith(where) and where in str(error.value.param)


# --- requests as clients send them ---


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "adaptive", "display": "summarized"}},
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}},
        {"output_config": {"effort": "max"}, "service_tier": "auto", "metadata": {"user_id": "u"}},
        {"system": [{"type": "text", "text": "S", **MARK}], "context_management": {"edits": []}},
        {"tools": [{**TOOL, **MARK, "eager_input_streaming": True, "defer_loading": False}]},
        {"tools": [TOOL], "tool_choice": {"type": "none"}, "container": None, "mcp_servers": []},
        {"messages": [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "The"}]}]},
        {"messages": [*CHAT, {"role": "system", "content": "Be brief."}, *CHAT]},
    ],
)
def test_counted_tokens_are_those_of_the_request(
    run: Callable[[Test], None], fields: dict[str, Any]
) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        body = {"model": "s1-nano", "messages": CHAT, **fields}
        counted = await http.post(COUNT, json=body)
        assert counted.status_code == 200, counted.text
        ask = {**body, "max_tokens": 40, "temperature": 0}
        whole = await http.post(MESSAGES, params={"beta": "true"}, json=ask)
        assert whole.status_code == 200, whole.text
        usage = whole.json()["usage"]
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert counted.json() == {"input_tokens": prompt}
        events = events_of(await http.post(MESSAGES, json={**ask, "stream": True}))
        assert events[0]["message"]["usage"]["input_tokens"] == prompt
        thought = fields.get("thinking", {}).get("budget_tokens")
        assert thought is None or usage["thinking"]["tokens"] <= thought

    run(test)


def test_structured_output(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        form = {"type": "json_schema", "schema": SCHEMA}
        for fields in ({"output_config": {"format": form}}, {"output_format": form}):
            body = {"messages": CHAT, "max_tokens": 200, **fields}
            answer = (await http.post(MESSAGES, json=body)).json()
            assert 0 <= json.loads(answer["content"][-1]["text"])["b"] <= 9

    run(test)


def test_tools_of_other_kinds_are_left_out_by_name(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
        body: dict[str, Any] = {"messages": CHAT, "max_tokens": 40, "tools": [search, TOOL]}
        answer = await http.post(MESSAGES, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-s1engine-ignored"] == "tools[0].web_search_20250305"
        body["tool_choice"] = {"type": "tool", "name": "web_search"}
        answer = await http.post(MESSAGES, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_choice"

    run(test)


# --- responses ---


def output(text: str, reasoning: str | None) -> RequestOutput:
    thinking = ThinkingUsage(1, 0, 0, "natural", 9) if reasoning is not None else None
    sample = CompletionOutput(0, text, reasoning, [1], [0], "stop", None, thinking, None)
    return RequestOutput("r", [1, 2], [sample], Usage(2, 1, 1, 0), Timing(0, 0, 0), [])


@given(
    st.lists(st.sampled_from(["a", "b ", "<tool_call>", "</tool", "{", "é", "\n"]), max_size=6),
    st.none() | st.text("xy", min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 5),
)
def test_the_events_joined_are_the_whole_message(
    parts: list[str], reasoning: str | None, shows: bool, size: int
) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text = "".join(parts).replace("<tool_call>", call)
    finished = output(text, reasoning)

    def formatter() -> MessagesFormatter:
        return MessagesFormatter(ResponseHead("msg_1", 0, "m", 2), 1, ToolCallParser(), shows)

    stream = formatter()
    raw = [*stream.begin_events()]
    if reasoning:
        raw += stream.chunk_events(0, Chunk(0, reasoning=reasoning))
    for at in range(0, len(text), size):
        raw += stream.chunk_events(0, Chunk(0, text=text[at : at + size]))
    raw += stream.chunk_events(0, Chunk(0, finish_reason="stop"))
    raw += stream.end_events([finished])
    events = [json.loads(event.partition(b"data: ")[2]) for event in raw]
    assert events[0]["message"]["usage"] == {"input_tokens": 2, "output_tokens": 0}
    assert joined(events) == formatter().format_response([finished])


@given(st.integers(0, 3), st.sampled_from(["", "So: "]), st.integers(1, 30))
def test_a_call_that_is_cut_takes_no_other_call_along(calls: int, before: str, size: int) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    cut = '<tool_call>\n{"name": "f", "arguments": {"a": "a text that is long"}}'[: size + 35]
    message = MessagesFormatter(ResponseHead("msg_1", 0, "m", 2), 1, ToolCallParser(), True)
    content = message.format_response([output(before + call * calls + cut, None)])["content"]
    kept = [block["input"] for block in content if block["type"] == "tool_use"]
    assert kept == [{"a": 1}] * calls
    assert content[-1]["type"] == "text" and content[-1]["text"].endswith(cut)
    assert not before or content[0]["text"].startswith(before if not calls else before.rstrip())


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events."""
    message: dict[str, Any] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"] | {"json": ""})
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                if delta["type"] == "signature_delta":
                    block["signature"] = delta["signature"]
                elif delta["type"] == "input_json_delta":
                    block["json"] += delta["partial_json"]
                else:
                    name = delta["type"].removesuffix("_delta")
                    block[name] += delta[name]
            case "content_block_stop":
                block = message["content"][event["index"]]
                if text := block.pop("json"):
                    block["input"] = json.loads(text)
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    return message


# --- errors ---


def test_errors_have_anthropics_shape(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        good: dict[str, Any] = {"messages": CHAT, "max_tokens": 9}
        negative = {"type": "enabled", "budget_tokens": -7}
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({"json": {**good, "max_tokens": 0}}, 400, "max_tokens"),
            ({"json": {**good, "model": "gpt"}}, 404, "gpt"),
            ({"json": {**good, "messages": []}}, 400, "messages"),
            ({"json": {**good, "stop_sequences": [""]}}, 400, "stop_sequences"),
            ({"json": {**good, "thinking": negative}}, 400, "budget_tokens"),
            ({"json": {**good, "output_config": {"effort": "huge"}}}, 400, "effort"),
            ({"json": good, "headers": {"x-api-key": "no"}}, 401, "API key"),
            ({"content": b"[" * 2**18}, 413, "brackets"),
        ]
        for fields, status, words in cases:
            for path in (MESSAGES, COUNT):
                if path == COUNT and words in ("max_tokens", "stop_sequences", "budget_tokens"):
                    continue
                answer = await http.post(path, **fields)
                assert answer.status_code == status, answer.text
                body = answer.json()
                assert body["type"] == "error" and body["error"]["type"] == KINDS[status]
                assert words in body["error"]["message"]
                assert body["request_id"] == answer.headers["request-id"]

    run(test)


def test_clients_are_told_to_go_on_without_threads(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
            body = {"messages": CHAT, "max_tokens": 9, "thread": thread}
            answer = await http.post(MESSAGES, json=body)
            assert answer.status_code == 400
            details = answer.json()["error"]["details"]
            assert details == {
                "error_code": "thread_unsupported_request",
                "unsupported": ["thread"],
            }

    run(test)


@given(st.sampled_from([*KINDS, 405, 500, 502]), st.text(), st.none() | st.text())
def test_any_error_is_rewritten_and_nothing_else(status: int, message: str, param: Any) -> None:
    inner = json.dumps(error_object(message, "x", param, "c")).encode()
    once = rewrite(inner, status, "r")
    assert json.loads(once)["error"]["message"] == message
    assert rewrite(once, status, "r") == once  # a router rewrites what a replica has rewritten
    for body in (b"", b"{}", b"[1]", b'{"error": "x"}', message.encode(errors="replace")):
        assert rewrite(body, status, "r") == body


def test_models_have_the_shape_that_is_asked_for(run: Callable[[Test], None]) -> None:
    async def test(http: httpx.AsyncClient, engine: Scripted) -> None:
        headers = {"anthropic-version": "2023-06-01"}
        for path in ("/v1/models", "/v1/models/s1-nano"):
            own = (await http.get(path, headers=headers)).json()
            theirs = (await http.get(path)).json()
            one, other = own.get("data", [own])[0], theirs.get("data", [theirs])[0]
            assert one["type"] == "model" and other["object"] == "model"
            assert one["id"] == other["id"] == one["display_name"] == "s1-nano"
        missing = await http.get("/v1/models/x", headers=headers)
        assert missing.status_code == 404 and missing.json()["type"] == "error"

    run(test)
