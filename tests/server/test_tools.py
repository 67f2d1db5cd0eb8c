"""Tools over HTTP: the prompt, calls in each API, streamed and whole, and calls that are required,
which come after the thinking."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import openai
import pytest

from s1engine.chat_template import ChatTemplate, check_messages
from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.errors import RequestError
from s1engine.server.app import create_app
from tests.server.tool_script import (
    CALLS,
    CHAT,
    FUNCTIONS,
    HISTORY,
    SAID,
    TEMPLATE,
    THOUGHT,
    TOOLS,
    Scripted,
)
from tests.shared_data import shared_file
from tests.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE)
    return str(path)


Test = Callable[[openai.AsyncOpenAI, httpx.AsyncClient, Scripted], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def run(template: str) -> Iterator[Callable[[Test], None]]:
    """Runs a test with the official client and a bare one; one engine for all tests."""
    engine = AsyncLLMEngine(EngineConfig(dtype="float32", chat_template=template))
    with asyncio.Runner() as runner:
        runner.run(engine.start())

        def run(test: Test) -> None:
            async def main() -> None:
                scripted = Scripted(engine)
                app: Any = create_app(scripted)  # type: ignore[arg-type]
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                    client = openai.AsyncOpenAI(
                        base_url="http://x/v1", api_key="-", http_client=http, max_retries=0
                    )
                    await test(client, http, scripted)

            runner.run(main())

        yield run
        runner.run(engine.shutdown())


# --- what the model is shown ---


@pytest.mark.parametrize("model", ["qwen2.5", "qwen3"])
def test_prompts_are_those_of_the_models_own_template(model: str) -> None:
    """As transformers applies it, to messages whose arguments are objects."""
    from transformers.utils.chat_template_utils import render_jinja_template

    config = json.loads(shared_file(f"tokenizer/{model}/tokenizer_config.json").read_text())
    template = ChatTemplate(config["chat_template"], {})
    plain = json.loads(json.dumps(HISTORY))
    for call in plain[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    for n in (1, 2, 4, 5):
        (wanted,), _ = render_jinja_template(
            [plain[:n]],
            tools=TOOLS,
            chat_template=config["chat_template"],
            add_generation_prompt=True,
        )
        assert template.render(HISTORY[:n], {}, TOOLS) == wanted
    assert "<tools>" in wanted and "Østfold" in wanted and "<tool_response>" in wanted


def test_a_template_without_tools_refuses_them() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(RequestError) as error:
        tokenizer.render_chat(CHAT, tools=TOOLS)
    assert error.value.param == "tools"
    with pytest.raises(RequestError) as error:
        tokenizer.render_chat(HISTORY)
    assert error.value.param == "messages"


def test_each_api_shows_the_model_the_same(run: Callable[[Test], None]) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        engine.said = "x"
        await client.chat.completions.create(model="s1-nano", messages=HISTORY, tools=TOOLS)
        items: list[Any] = [HISTORY[0], {"role": "assistant", "content": "Let me see."}]
        blocks: list[Any] = [{"type": "text", "text": "Let me see."}]
        results: list[Any] = []
        for call, answer in zip(HISTORY[1]["tool_calls"], HISTORY[2:4], strict=True):
            name, function = call["id"], call["function"]
            items.append({"type": "function_call", "call_id": name, **function})
            arguments = json.loads(function["arguments"])
            blocks.append(
                {"type": "tool_use", "id": name, "name": function["name"], "input": arguments}
            )
            content = [{"type": "text", "text": answer["content"]}]
            results.append({"type": "tool_result", "tool_use_id": name, "content": content})
        for answer in HISTORY[2:4]:
            name = answer["tool_call_id"]
            items.append(
                {"type": "function_call_output", "call_id": name, "output": answer["content"]}
            )
        items.append(HISTORY[4])
        flat: list[Any] = [{"type": "function", **function} for function in FUNCTIONS]
        await client.responses.create(model="s1-nano", input=items, tools=flat)
        turns = [HISTORY[0], {"role": "assistant", "content": blocks}]
        turns.append({"role": "user", "content": [*results, {"type": "text", **_text(HISTORY[4])}]})
        tools = [
            {"input_schema" if k == "parameters" else k: v for k, v in function.items()}
            for function in FUNCTIONS
        ]
        body = {"messages": turns, "tools": tools, "max_tokens": 200}
        answer = await http.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        prompts = [engine.compiler.text.tokenizer.decode(r.prompt, False) for r in engine.asked]
        assert len(prompts) == 3 and len(set(prompts)) == 1
        assert json.dumps(TOOLS[1]) in prompts[0] and "Østfold" in prompts[0]
        none = await http.post(
            "/tokenize", json={"messages": CHAT, "tools": TOOLS, "enable_thinking": False}
        )
        assert none.json()["count"] > 150

    run(test)


def _text(message: dict[str, Any]) -> dict[str, Any]:
    return {"text": message["content"]}


# --- what its calls become ---


def test_calls_of_a_chat(run: Callable[[Test], None]) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        engine.said = SAID
        ask: Any = {"model": "s1-nano", "messages": CHAT, "tools": TOOLS}
        whole = await client.chat.completions.create(**ask)
        choice = whole.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Well."
        assert choice.message.reasoning == THOUGHT  # type: ignore[attr-defined]
        calls: list[Any] = choice.message.tool_calls or []
        assert [(c.function.name, c.function.arguments) for c in calls] == CALLS
        assert len({call.id for call in calls}) == 2
        texts, content, named = ["", ""], "", []
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            for part in delta.tool_calls or []:
                assert part.function is not None
                if part.function.name is not None:
                    named.append((part.index, part.function.name, part.id is not None))
                    assert texts[part.index] == ""
                texts[part.index] += part.function.arguments or ""
        assert named == [(0, "add", True), (1, "stop_it", True)]
        assert texts == [text for _, text in CALLS] and content == "Well."
        assert chunk.choices[0].finish_reason == "tool_calls"
        async with client.chat.completions.stream(**ask) as stream:  # the client joins it itself
            joined = (await stream.get_final_completion()).choices[0].message.tool_calls or []
        assert [(c.function.name, c.function.arguments) for c in joined] == CALLS
        engine.finish_reason = "length"
        cut = await client.chat.completions.create(**ask)
        assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.tool_calls
        engine.finish_reason = "stop"
        for change in ({"tool_choice": "none"}, {"tools": []}):  # nothing is offered or read
            plain = await client.chat.completions.create(**{**ask, **change})
            assert plain.choices[0].message.content == SAID
            assert plain.choices[0].finish_reason == "stop"
        engine.said = "<tool_call>{add(7)}</tool_call>"
        odd = await client.chat.completions.create(**ask)
        assert odd.choices[0].message.content == engine.said
        assert not odd.choices[0].message.tool_calls and odd.choices[0].finish_reason == "stop"

    run(test)


def test_calls_of_a_response(run: Callable[[Test], None]) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        engine.said = SAID
        tools: list[Any] = [{"type": "function", **function} for function in FUNCTIONS]
        ask: Any = {"model": "s1-nano", "input": "q", "tools": tools}
        whole = await client.responses.create(**ask)
        calls = [item for item in whole.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == CALLS
        assert whole.output_text == "Well." and whole.output[0].type == "reasoning"
        async with client.responses.stream(**ask) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds.count("response.function_call_arguments.done") == 2
        assert kinds.count("response.output_item.added") == 4 == len(final.output)
        assert kinds.count("response.output_item.done") == 4
        streamed = [item for item in final.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in streamed] == CALLS

    run(test)


def test_calls_of_a_message(run: Callable[[Test], None]) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        engine.said = SAID
        tools = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
        body: Any = {"messages": CHAT, "max_tokens": 99, "tools": tools}
        whole = (await http.post("/v1/messages", json=body)).json()
        assert [block["type"] for block in whole["content"]] == [
            "thinking",
            "text",
            "tool_use",
            "tool_use",
        ]
        assert [(b["name"], b["input"]) for b in whole["content"][2:]] == [
            (name, json.loads(text)) for name, text in CALLS
        ]
        assert whole["stop_reason"] == "tool_use"
        answer = await http.post("/v1/messages", json={**body, "stream": True})
        events = [
            json.loads(line.removeprefix("data: "))
            for line in answer.text.splitlines()
            if line.startswith("data: ")
        ]
        starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        assert [s["type"] for s in starts] == ["thinking", "text", "tool_use", "tool_use"]
        assert [s["id"][:5] for s in starts[2:]] == ["call_"] * 2
        joined = {2: "", 3: ""}
        for event in events:
            if event.get("delta", {}).get("type") == "input_json_delta":
                joined[event["index"]] += event["delta"]["partial_json"]
        assert list(joined.values()) == [text for _, text in CALLS]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        engine.said = '<tool_call>\n{"name": "add", "arguments": {"n": }}\n</tool_call>'
        odd = (await http.post("/v1/messages", json=body)).json()
        assert odd["content"][1:] == [{"type": "text", "text": engine.said}]
        assert odd["stop_reason"] == "end_turn"

    run(test)


# --- calls that must come ---


@pytest.mark.parametrize("budget", [{"thinking_token_budget": 6}, {"enable_thinking": False}])
def test_a_call_that_must_come_comes_after_the_thinking(
    run: Callable[[Test], None], budget: dict[str, Any]
) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        ask: Any = {"messages": CHAT, "max_tokens": 500, "temperature": 1, "n": 4, **budget}
        ask |= {"seed": 1, "tools": TOOLS, "parallel_tool_calls": False}
        names = set()
        for choice in ("required", {"type": "function", "function": {"name": "stop_it"}}):
            body = {**ask, "tool_choice": choice}
            got = (await http.post("/v1/chat/completions", json=body)).json()
            for one in got["choices"]:
                (call,) = one["message"]["tool_calls"]
                assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
                name, value = call["function"]["name"], json.loads(call["function"]["arguments"])
                assert value == {} if name == "stop_it" else 0 <= value["n"] <= 99
                assert choice == "required" or name == "stop_it"
                names.add(name)
                thought = one["message"]["reasoning"]
                assert bool(thought) == ("enable_thinking" not in budget)
        assert names == {"add", "stop_it"}
        flat = [{"type": "function", **function} for function in FUNCTIONS]
        must = {"type": "function", "name": "add"}
        response = {"input": "a=3 b?", "max_output_tokens": 300, "tools": flat, "tool_choice": must}
        got = (await http.post("/v1/responses", json=response)).json()
        assert [i["name"] for i in got["output"] if i["type"] == "function_call"] == ["add"]
        assert got["tool_choice"] == must
        schemas = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
        message = {"messages": CHAT, "max_tokens": 300, "tools": schemas}
        message["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
        got = (await http.post("/v1/messages", json=message)).json()
        assert got["stop_reason"] == "tool_use" and got["content"][-1]["type"] == "tool_use"

    run(test)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [{"type": "wizard"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": TOOLS * 99}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tool_choice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "ape"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"messages": [*CHAT, {"role": "assistant", "tool_calls": "x"}]}, "messages"),
        ({"messages": [*CHAT, {"role": "tool"}]}, "messages"),
    ],
)
def test_bad_tools_are_named(
    run: Callable[[Test], None], fields: dict[str, Any], param: str
) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        answer = await http.post("/v1/chat/completions", json={"messages": CHAT, **fields})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(param)

    run(test)


@pytest.mark.parametrize("arguments", ["{", "[1]", 3, None, "null"])
def test_arguments_that_come_back_broken_are_named(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(RequestError) as error:
        check_messages([*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert error.value.param == "messages[1].tool_calls[0].function.arguments"
