"""Tools over HTTP: the prompt, calls in each API, streamed and whole, and calls that are required,
which come after the thinking."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from s1engine.chat_template import ChatTemplate, check_messages
from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.errors import RequestError
from s1engine.server.api.calls_grammar import closed
from s1engine.server.app import create_app
from s1engine.tool_formats import FORMATS
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


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
STERN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN.partition("%}")[2]
)
DEAF = PLAIN.replace("<{{", "{% if m.role != 'system' %}<{{", 1).replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [PLAIN, STERN, DEAF])
def test_a_template_without_tools_shows_them_as_text(source: str) -> None:
    template = ChatTemplate(source, {})
    asked = template.render(CHAT, {}, TOOLS)
    assert all(json.dumps(tool["function"]) in asked for tool in TOOLS)
    assert template.shows_system == ("<system>" in asked) == (source == PLAIN)
    told = template.render(HISTORY, {})  # without an offer, calls and results stay
    call = {"name": "add", "arguments": {"n": 0, "city": "Østfold"}}
    assert f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" in told
    assert '<tool_response>\n{"t": 21}\n</tool_response>\nWhich is warmer?</user>' in told
    own = [{"role": "system", "content": "Be brief."}, *CHAT]
    if source == PLAIN:
        both = template.render(own, {}, TOOLS)
        assert both.startswith("<system>Be brief.\n\nYou can call") and both.count("<system>") == 1


def test_calls_without_arguments_have_empty_ones() -> None:
    for arguments in (None, "", " ", {}, "{}"):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        (turn,) = check_messages([{"role": "assistant", "tool_calls": [call]}])
        assert turn["tool_calls"][0]["function"]["arguments"] == {}


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


# --- calls that must come, or may ---


def allowed(mode: str, *names: str) -> Any:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("structure", "follows"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            lambda text: 0 <= json.loads(text)["b"] <= 9,
        ),
        ({"structured_outputs": {"regex": "[0-9]{2}/x"}}, re.compile("[0-9]{2}/x").fullmatch),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"].__contains__),
    ],
)
def test_a_structured_answer_may_call_tools(
    run: Callable[[Test], None], structure: dict[str, Any], follows: Callable[[str], Any]
) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        ask: Any = {"messages": CHAT, "max_tokens": 300, "temperature": 1, "n": 4, "seed": 3}
        ask |= {"tools": TOOLS, "parallel_tool_calls": False, "thinking_token_budget": 4}
        (bracket,) = engine.compiler.text.tokenizer.encode("<")
        for bias in (100, -100):  # the model is made to call, or not to
            body = {**ask, **structure, "logit_bias": {str(bracket): bias}}
            got = (await http.post("/v1/chat/completions", json=body)).json()
            for one in got["choices"]:
                message = one["message"]
                if bias < 0:
                    assert follows(message["content"]) and "tool_calls" not in message
                    continue
                (call,) = message["tool_calls"]
                assert call["function"]["name"] in ("add", "stop_it")
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
                assert one["finish_reason"] == "tool_calls" and message["content"] is None

    run(test)


def test_allowed_tools_alone_are_offered_and_called(run: Callable[[Test], None]) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        ask: Any = {"messages": CHAT, "max_tokens": 300, "tools": TOOLS, "enable_thinking": False}
        must = {**ask, "tool_choice": allowed("required", "stop_it")}
        got = (await http.post("/v1/chat/completions", json=must)).json()
        names = [call["function"]["name"] for call in got["choices"][0]["message"]["tool_calls"]]
        assert set(names) == {"stop_it"}
        flat = [{"type": "function", "name": "stop_it"}]
        for choice in (flat[0], {"type": "allowed_tools", "mode": "required", "tools": flat}):
            same = (
                await http.post("/v1/chat/completions", json={**ask, "tool_choice": choice})
            ).json()
            (call, *_) = same["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == "stop_it"
        prompt = engine.compiler.text.tokenizer.decode(engine.asked[0].prompt, False)
        assert "stop_it" in prompt and "Adds." not in prompt
        engine.said = "No."
        may = {**ask, "tool_choice": allowed("auto", "stop_it")}
        got = (await http.post("/v1/chat/completions", json=may)).json()
        assert got["choices"][0]["message"]["content"] == "No."

    run(test)


@pytest.mark.parametrize("call", SAID.partition("\n")[2].split("</tool_call>")[:1])
def test_an_answer_ends_with_its_only_call(run: Callable[[Test], None], call: str) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        ask: Any = {"model": "s1-nano", "messages": CHAT, "tools": TOOLS}
        ask["parallel_tool_calls"] = False
        for said in (call, '<tool_call>{"arguments": {"n": 7}, "name": "add"}'):
            engine.said, engine.stop_reason = said, "</tool_call>"  # ended by this stop string
            whole = (await client.chat.completions.create(**ask)).choices[0]
            assert engine.asked[-1].params.stop == ("</tool_call>",)
            assert [c.function.name for c in whole.message.tool_calls or []] == ["add"]
            assert whole.finish_reason == "tool_calls" and not whole.message.content
            async with client.chat.completions.stream(**ask) as stream:
                joined = (await stream.get_final_completion()).choices[0].message.tool_calls or []
            assert [(c.function.name, json.loads(c.function.arguments)) for c in joined] == [
                ("add", {"n": 7})
            ]
        body = {"messages": CHAT, "max_tokens": 99, "tool_choice": {"type": "auto"}}
        body["tools"] = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
        body["tool_choice"]["disable_parallel_tool_use"] = True  # type: ignore[index]
        message = (await http.post("/v1/messages", json=body)).json()
        assert message["stop_reason"] == "tool_use" and message["stop_sequence"] is None

    run(test)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_are_forced_and_read_in_the_models_format(
    run: Callable[[Test], None], name: str
) -> None:
    async def test(client: openai.AsyncOpenAI, http: httpx.AsyncClient, engine: Scripted) -> None:
        text = engine.compiler.text
        engine.compiler.text = replace(text, tool_format=FORMATS[name].of(text.tokenizer))
        try:
            transport: Any = httpx.ASGITransport(create_app(engine))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as other:
                strict = [
                    {"type": "function", "function": {**f, "strict": True}} for f in FUNCTIONS
                ]
                ask: Any = {"messages": CHAT, "max_tokens": 300, "tools": TOOLS, "seed": 5}
                ask |= {"parallel_tool_calls": False, "enable_thinking": False, "temperature": 1}
                forced = {**ask, "tool_choice": "any"}
                for body in (forced, {**ask, "tools": strict, "tool_choice": "any"}):
                    got = (await other.post("/v1/chat/completions", json=body)).json()
                    (call,) = got["choices"][0]["message"]["tool_calls"]
                    assert call["function"]["name"] in ("add", "stop_it")
                    assert isinstance(json.loads(call["function"]["arguments"]), dict)
                    assert got["choices"][0]["message"]["content"] is None
                free = await other.post("/v1/chat/completions", json={**ask, "tools": strict})
                ignored = free.headers.get("x-s1engine-ignored", "")
                assert ("tools.strict" in ignored) == (name == "openai")
                grammar = engine.asked[-1].params.grammar
                assert free.status_code == 200 and (grammar is None) == (name == "openai")
        finally:
            engine.compiler.text = text

    run(test)


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
        ({"tools": TOOLS, "structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "x")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice"),
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
        ({"messages": [*CHAT, {"role": "tool", "content": 3}]}, "messages"),
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


@pytest.mark.parametrize("arguments", ["{", "[1]", 3, "null", ["a"]])
def test_arguments_that_come_back_broken_stick_no_agent(arguments: Any) -> None:
    """It cannot change what the model wrote; what it made itself is refused by name."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]
    if isinstance(arguments, str):
        (seen,) = check_messages(chat)[-1]["tool_calls"]
        assert seen["function"]["arguments"] == {"invalid_json": arguments}
        return
    with pytest.raises(RequestError) as error:
        check_messages(chat)
    assert error.value.param == "messages[1].tool_calls[0].function.arguments"


def test_objects_of_arguments_are_closed_unless_they_say_so() -> None:
    leaf: dict[str, Any] = {"type": "object", "properties": {"a": {"const": {"properties": {}}}}}
    shut = {**leaf, "additionalProperties": False}
    free = {**leaf, "additionalProperties": True}
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        assert closed({keyword: [leaf, free, True]}) == {keyword: [shut, free, True]}
    for keyword in ("properties", "$defs"):
        assert closed({keyword: {"items": leaf}, "additionalProperties": leaf}) == {
            keyword: {"items": shut},
            "additionalProperties": shut,
        }
    assert closed({"items": leaf}) == {"items": shut}
    for alone in ({"type": "object"}, {}, {"properties": {}}, {"allOf": [leaf]}, {"enum": [leaf]}):
        assert closed(alone) == alone
