"""No API shows a marker that the model repeats in its answer, whole or streamed."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.server.app import create_app
from tests.engine.scripted_model import CHAT, SIZES, Script, save_model

TAGS = ("<think>", "</think>")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "return_token_ids": True},
    "/v1/completions": {"prompt": "why?", "return_token_ids": True},
    "/v1/responses": {"input": "why?"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 64},
}


@pytest.fixture(scope="module", params=[TAGS, ()], ids=["own tokens", "spelt out"])
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = save_model(tmp_path_factory.mktemp("model"), request.param)
    config = EngineConfig(model=str(path), reasoning_format="think-tag", **SIZES)
    engine = AsyncLLMEngine(config)
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        yield runner, engine, Script(engine.engine)
        runner.run(engine.shutdown())


def texts(value: Any) -> list[str]:
    """All texts of an object."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 2, None])
@pytest.mark.parametrize("path", BODIES)
def test_no_api_shows_a_repeated_marker(
    engine: Any, path: str, budget: int | None, stream: bool
) -> None:
    runner, served, script = engine
    encode = served.engine.tokenizer.encode
    body = {**BODIES[path], "thinking_token_budget": 99 if budget is None else budget}
    script.ids = encode("x y z</think>so</thin</think>!</think>")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.post(path, json={**body, "stream": stream}, timeout=60)

    answer = runner.run(ask())
    assert answer.status_code == 200, answer.text
    if stream:
        lines = answer.text.splitlines()
        objects = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    else:
        objects = [answer.json()]
    everything = texts(objects)
    assert not any("</think>" in text for text in everything)
    content = "".join(map(content_of, objects))
    thought = encode("x y z")
    assert content == served.engine.tokenizer.decode(thought[body["thinking_token_budget"] :]) + (
        "so</thin!"
    )


def content_of(value: dict[str, Any]) -> str:
    """The content of a response or of an event of a stream, in any API."""
    if value.get("type") == "response.output_text.delta":
        return str(value["delta"])
    if value.get("type") == "content_block_delta":
        return str(value["delta"].get("text", ""))
    if value.get("object") == "response":
        messages = [item for item in value["output"] if item["type"] == "message"]
        return "".join(part["text"] for item in messages for part in item["content"])
    if value.get("type") == "message":
        return "".join(block.get("text", "") for block in value["content"])
    choices = value.get("choices", [])
    bodies = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    return "".join(str(body.get("content") or body.get("text") or "") for body in bodies)


def test_the_model_says_how_it_thinks(engine: Any, tmp_path: Path) -> None:
    runner, served, _ = engine

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/v1/models")

    (model,) = runner.run(ask()).json()["data"]
    assert model["reasoning_format"] == "think-tag" and model["thinks_by_default"] is True
