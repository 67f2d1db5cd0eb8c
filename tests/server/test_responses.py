"""The Responses API: a stream is the whole response, clients' own types accept both, and references
to stored responses are what they refer to."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from s1engine.errors import RequestError
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput, Timing, Usage
from s1engine.sampling_params import SamplingParams
from s1engine.server.admission import NotAdmitted
from s1engine.server.api.free_text import FreeTextParser
from s1engine.server.api.response_formatter import ResponseHead
from s1engine.server.api.response_tools import ResponseTools
from s1engine.server.api.responses import ENCRYPTED, ResponsesChat, ResponsesRequest
from s1engine.server.api.responses_formatter import ResponsesFormatter
from s1engine.server.api.tool_call_parser import ToolCallParser
from s1engine.server.buffer_budget import BufferBudget, BufferLease
from s1engine.server.request_notes import NOTES, RequestNotes
from s1engine.server.response_routes import ResponseRoutes
from s1engine.server.response_store import ResponseStore, StoredResponse
from tests.server.conftest import Served

PATH = "/v1/responses"
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
GROUP = {"type": "namespace", "name": "files", "description": "", "tools": [ADD]}
FIRST: dict[str, Any] = {"input": "a=3 b=a+4 b?", "temperature": 0, "max_output_tokens": 200}
NEXT: dict[str, Any] = {"role": "user", "content": "a=1 b=a+1 b?"}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
EVENTS: dict[str, Any] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


@pytest.fixture(autouse=True)
def notes() -> Iterator[RequestNotes]:
    """The notes of a request to a server that is not strict."""
    lenient = RequestNotes(strict=False)
    token = NOTES.set(lenient)
    yield lenient
    NOTES.reset(token)


# --- streams ---

free_texts = st.text(st.sampled_from('ab"\\/{}\n\té😀<'), max_size=12)
arguments = st.one_of(
    free_texts,
    st.builds(lambda text: json.dumps({"input": text}), free_texts),
    st.builds(lambda text: json.dumps({"input": text}, ensure_ascii=False), free_texts),
    st.sampled_from(
        ['{"n": 7}', "{}", '{"input": 5}', r'{"input": "\ud83d\q', r'{"input": "\ud83']
    ),
)
calls = st.builds(
    lambda name, text: f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>',
    st.sampled_from(["add", "apply_patch", "files__add", "unknown"]),
    arguments,
)
answers = st.lists(st.one_of(free_texts, calls), max_size=4).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]


def formatter(include: list[str]) -> ResponsesFormatter:
    tools: list[Any] = [ADD, PATCH, GROUP]
    body = ResponsesRequest(input="a", tools=tools, include=include)
    head = ResponseHead("resp_1", 1, "m")
    return ResponsesFormatter(head, 1, body, ResponseTools(tools), parser=ToolCallParser())


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client joins them from deltas, which must agree with the done events."""
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            texts.append("")
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[-1]["id"]
            texts[-1] += event["delta"]
        elif kind.endswith("_text.done"):
            assert event["text"] == texts[-1]
        elif kind == "content_part.done":
            assert event["part"]["text"] == texts[-1]
        elif kind in ("function_call_arguments.done", "custom_tool_call_input.done"):
            assert event["input" if "input" in event else "arguments"] == texts[-1]
        elif kind == "output_item.done":
            item = event["item"]
            content = item.get("content") or [{}]
            text = item.get("arguments", item.get("input", content[0].get("text")))
            assert (item["id"], text) == (items[-1]["id"], texts[-1])
            items[-1] = item
    return items


@settings(max_examples=60)
@given(
    st.text("ab\n", max_size=5),
    answers,
    st.lists(st.integers(0, 99), max_size=6),
    st.sampled_from(["stop", "length"]),
    st.sampled_from([[], [ENCRYPTED]]),
)
def test_a_stream_adds_up_to_the_whole_response(
    thought: str, answer: str, places: list[int], reason: Any, include: list[str]
) -> None:
    sample = CompletionOutput(0, answer, thought or None, [], [], reason, None, None, None)
    output = RequestOutput("r", [1], [sample], Usage(1, 1, 0, 0), Timing(0.1, 0.2, 0.3), [])
    whole = formatter(include).format_response([output])
    streaming = formatter(include)
    lines = [*streaming.begin_events()]
    chunks = [Chunk(0, reasoning=piece) for piece in cut(thought, places)]
    chunks += [Chunk(0, piece) for piece in cut(answer, places)]
    for chunk in (*chunks, Chunk(0, finish_reason=reason)):
        lines += streaming.chunk_events(0, chunk)
    lines += streaming.end_events([output])
    events = [json.loads(line.split(b"data: ")[1]) for line in lines]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert rebuilt(events[2:-1]) == whole["output"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert {**last, "completed_at": 0} == {**whole, "completed_at": 0}
    assert whole["output"][-1]["type"] != "reasoning"
    assert whole["output"][-1]["status"] == whole["status"]
    for item in whole["output"]:
        if item["type"] == "custom_tool_call":
            assert item["name"] == "apply_patch"
        elif "namespace" in item:
            assert (item["namespace"], item["name"]) == ("files", "add")
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    Response.model_validate(whole)


def test_an_error_fails_the_response() -> None:
    lines = [*formatter([]).error_events("too slow", "request_timeout")]
    error, failed = (json.loads(line.split(b"data: ")[1]) for line in lines)
    assert EVENTS["error"].model_validate(error).code == "request_timeout"
    response = EVENTS["response.failed"].model_validate(failed).response
    assert (response.status, response.error.message) == ("failed", "too slow")


@given(st.text(), st.lists(st.integers(0, 99), max_size=6), st.booleans())
def test_free_text_is_what_json_says(text: str, places: list[int], plain: bool) -> None:
    parser = FreeTextParser()
    pieces = cut(json.dumps({"input": text}, ensure_ascii=plain), places)
    assert "".join([*map(parser.push, pieces), parser.push("", last=True)]) == text


# --- tools and items ---


def chat_of(items: list[Any], **fields: Any) -> ResponsesChat:
    return ResponsesRequest.model_validate({"input": items, **fields}).to_chat()


def test_custom_and_grouped_tools_are_functions_of_the_chat(notes: RequestNotes) -> None:
    tools = [ADD, GROUP, PATCH | {"format": GRAMMAR}, {"type": "web_search"}]
    chat = chat_of([{"role": "user", "content": "a"}], tools=tools)
    functions = [tool["function"] for tool in chat.offered]
    assert [one["name"] for one in functions] == ["add", "files__add", "apply_patch"]
    assert functions[2]["parameters"]["required"] == ["input"]
    assert GRAMMAR["definition"] in functions[2]["description"]
    assert list(notes.ignored) == ["tools[2].format", "tools[3].web_search"]
    named = {"type": "function", "name": "add", "namespace": "files"}
    chat = chat_of([{"role": "user", "content": "a"}], tools=tools, tool_choice=named)
    assert chat.tool_choice.function.name == "files__add"  # type: ignore[union-attr]
    subset = {"type": "allowed_tools", "mode": "required", "tools": [named, {"type": "mcp"}]}
    chat = chat_of([{"role": "user", "content": "a"}], tools=tools, tool_choice=subset)
    assert [tool["function"]["name"] for tool in chat.offered] == ["files__add"]


def test_what_a_response_calls_is_what_the_next_turn_shows() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "encrypted_content": "s1engine:aG0="},
        {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": 'x "y"'},
        {"type": "function_call", "call_id": "2", "namespace": "files", "name": "add"}
        | {"arguments": "{}"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "done"},
        {"type": "function_call_output", "call_id": "2"}
        | {"output": [{"type": "input_text", "text": "7"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    messages = chat_of(items, tools=[ADD, GROUP, PATCH]).messages
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["reasoning_content"] == "hm"
    custom, grouped = (call["function"] for call in messages[1]["tool_calls"])
    assert json.loads(custom["arguments"]) == {"input": 'x "y"'}
    assert grouped["name"] == "files__add"
    assert [message["content"] for message in messages[2:]] == ["done", "7", "no"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "user", "content": "a"}, {"type": "web_search_call"}]}, "input[1]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "custom_tool_call", "input": 5}]}, "input[0].input"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tools": [{"type": "x" * 99}] * 99}, "tools[24]"),
        ({"tools": [ADD, {**PATCH, "name": "add"}]}, "tools[1]"),
        ({"tools": [PATCH | {"format": GRAMMAR}], "tool_choice": "required"}, "tools"),
        ({"tools": [PATCH | {"format": {"type": "grammar"}}]}, "tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "wizard"}}}, "text.format"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"conversation": "x"}, "conversation"),
        ({"background": True}, "background"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 2}, "n"),
    ],
)
def test_errors_name_what_was_sent(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValueError) as raised:
        chat = ResponsesRequest.model_validate({"input": "a", **fields}).to_chat()
        chat.sampling_params({})
    error: Any = raised.value
    if not isinstance(error, RequestError):
        first = error.errors()[0]
        error = first.get("ctx", {}).get("error") or RequestError("", param=first["loc"][0])
    assert error.param.startswith(param)


def test_errors_of_the_chat_name_the_item() -> None:
    items = [{"type": "reasoning", "summary": []}, {"role": "wizard", "content": "a"}]
    chat = chat_of(items, instructions="Be brief.")
    assert isinstance(chat.sampling_params({}), SamplingParams)
    error = RequestError("messages[1].role must be ...", param="messages[1].role")
    renamed = chat.renamed_error(error)
    assert renamed.param == "input[1]" and str(renamed).startswith("input[1].role")


# --- the store ---


def stored(size: int, previous: str | None = None) -> StoredResponse:
    return StoredResponse(b"{}", b"[]", (b"x" * size,), previous)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4000), st.booleans()), max_size=30)
)
def test_the_store_keeps_its_bound_and_takes_from_the_largest_client(
    steps: list[tuple[str, int, bool]],
) -> None:
    now = [0.0]
    store = ResponseStore(16_000, clock=lambda: now[0])
    kept: dict[str, dict[str, StoredResponse]] = {"a": {}, "b": {}, "c": {}}
    for i, (client, size, removes) in enumerate(steps):
        if removes and kept[client]:
            name = next(iter(kept[client]))
            assert store.remove(client, name) and not store.remove(client, name)
            del kept[client][name]
        else:
            kept[client][str(i)] = stored(size)
            store.add(client, str(i), kept[client][str(i)])
        used = {who: sum(r.num_bytes for r in own.values()) for who, own in kept.items()}
        while sum(used.values()) > 16_000:
            largest = max(used, key=lambda who: used[who])
            oldest = next(iter(kept[largest]))
            used[largest] -= kept[largest].pop(oldest).num_bytes
        assert store.num_bytes == sum(used.values())
    for who, own in kept.items():
        others = {name for other, names in kept.items() if other != who for name in names}
        assert all(store.get(who, name) is response for name, response in own.items())
        assert not any(store.get(who, name) for name in others)
    now[0] = 1e9
    assert not any(store.get(who, name) for who, own in kept.items() for name in own)
    assert store.num_bytes == 0


def test_a_conversation_is_bounded_and_whole() -> None:
    store = ResponseStore(8_000)
    for i in range(3):
        store.add("0", f"r{i}", stored(100, f"r{i - 1}" if i else None))
    assert len(store.conversation("0", "r2", 4_000)) == 3
    for client, limit in (("1", 4_000), ("0", 2_000)):
        with pytest.raises(RequestError) as error:
            store.conversation(client, "r2", limit)
        assert error.value.param == "previous_response_id"
    store.remove("0", "r0")
    with pytest.raises(RequestError, match="send store: false and the whole input"):
        store.conversation("0", "r2", 4_000)
    for name in (None, 5, "rs_r1_1", "rs_r1_x", "rs_r1_²", "r1", "rs_r9_0"):
        with pytest.raises(RequestError, match="nothing is stored"):
            store.item("0", name, "input[0]")
    assert store.item("0", "rs_r1_0", "input[0]") == b"x" * 100
    nothing = ResponseStore(0)
    nothing.add("0", "r", stored(0))
    assert nothing.get("0", "r") is None


def test_what_a_request_refers_to_counts_like_its_body() -> None:
    store = ResponseStore(100_000)
    text = {"role": "assistant", "content": "x" * 900}
    response: dict[str, Any] = {"id": "resp_1", "output": [text], "previous_response_id": None}
    store.add("0", "resp_1", StoredResponse.of(response, [NEXT]))
    lease = BufferLease(BufferBudget(4_000))
    http: Any = SimpleNamespace(scope={"state": {"lease": lease}})
    routes = ResponseRoutes(None, store, 2_000)  # type: ignore[arg-type]

    def resolve(count: int) -> list[Any]:
        reference = {"type": "item_reference", "id": "msg_resp_1_0"}
        items: list[Any] = [dict(reference) for _ in range(count)]
        body = ResponsesRequest(input=items)
        asyncio.run(routes.resolve("0", body, http))
        return body.items

    assert resolve(1) == [text]
    with pytest.raises(RequestError) as error:
        resolve(3)
    assert error.value.param == "input"
    with pytest.raises(NotAdmitted):
        resolve(2)


# --- over HTTP ---


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    answer = served.http.post(PATH, json={**FIRST, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_references_are_what_they_refer_to(served: Served) -> None:
    first = ask(served, instructions="Be brief.")
    assert first["store"]
    items = [{"role": "user", "content": FIRST["input"]}, *first["output"], NEXT]
    wanted = ask(served, input=items, store=False)
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    by_item = ask(served, input=[items[0], *references, NEXT])
    by_response = ask(served, input=[NEXT], previous_response_id=first["id"])
    third = ask(served, input="c?", previous_response_id=by_response["id"])
    longer = [*items, *by_response["output"], {"role": "user", "content": "c?"}]
    for got, whole in (
        (by_item, wanted),
        (by_response, wanted),
        (third, ask(served, input=longer)),
    ):
        assert got["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        texts = [[item["content"] for item in each["output"]] for each in (got, whole)]
        assert texts[0] == texts[1]


def test_stored_responses_can_be_read_and_deleted(served: Served) -> None:
    with served.client.responses.stream(model="s1-nano", **FIRST) as stream:
        events = list(stream)
    response = events[-1].response  # type: ignore[union-attr]
    found = served.client.responses.retrieve(response.id)
    assert found.output_text == response.output_text != ""
    assert [item.id for item in found.output] == [item.id for item in response.output]
    (item,) = served.client.responses.input_items.list(response.id).data
    assert item.content == FIRST["input"]  # type: ignore[union-attr]
    assert served.http.post(f"{PATH}/{response.id}/cancel").status_code == 400
    served.client.responses.delete(response.id)
    hidden = ask(served, store=False)["id"]
    for name in (response.id, hidden):
        assert served.http.get(f"{PATH}/{name}").status_code == 404
        assert served.http.delete(f"{PATH}/{name}").status_code == 404
        answer = served.http.post(PATH, json={**FIRST, "previous_response_id": name})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "previous_response_id"


def test_an_agents_body_is_answered(served: Served) -> None:
    """The fields that Codex CLI sends, and names of our own making."""
    text = {"type": "input_text", "text": FIRST["input"]}
    body = {
        "input": [{"type": "message", "id": "msg_1", "role": "user", "content": [text]}],
        "tools": [{"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto", "effort": "low"},
        "include": [ENCRYPTED],
        "prompt_cache_key": "x",
        "client_metadata": {"session": "x"},
        "service_tier": "auto",
        "text": {"verbosity": "low"},
        "truncation": "auto",
        "stream_options": {"include_obfuscation": False},
    }
    answer = served.http.post(PATH, json={**FIRST, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-s1engine-ignored"] == "tools[0].web_search"
    reasoning = answer.json()["output"][0]
    kept = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
    message = {"role": "assistant", "content": "x"}
    (turn,) = chat_of([kept, message]).messages
    assert turn["reasoning_content"] == reasoning["content"][0]["text"]
