"""Requests of clients that are no libraries: bodies of our own with the fields and shapes that each
client's code sends. Each is answered, whole and streamed, and only what is named is ignored."""

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

HERE = Path(__file__).resolve().parent
BODIES = sorted((HERE / "bodies").glob("*.json"))


@pytest.fixture(scope="module")
def ask() -> Iterator[Any]:
    """Posts a body to the app in this process; one engine for all tests."""
    template = str(HERE / "nano.jinja")
    engine = AsyncLLMEngine(EngineConfig(dtype="float32", chat_template=template))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        app: Any = create_app(engine)  # type: ignore[arg-type]
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")

        def ask(route: str, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
            return runner.run(http.post(route, json=body, headers=headers))

        yield ask
        runner.run(http.aclose())
        runner.run(engine.shutdown())


def answer_of(route: str, reply: dict[str, Any]) -> tuple[str, bool]:
    """The text of a whole answer, and whether it calls a tool or was cut."""
    if route == "/v1/responses":
        parts = [part for item in reply["output"] for part in item.get("content") or ()]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        calls = any(item["type"] == "function_call" for item in reply["output"])
        return text, calls or reply["status"] == "incomplete"
    [choice] = reply["choices"]
    cut = choice["finish_reason"] in ("tool_calls", "length")
    return choice.get("text") or choice.get("message", {}).get("content") or "", cut


def streamed_answer(route: str, text: str) -> str:
    """The text of a stream, which is well-formed and complete."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    if route == "/v1/responses":
        events = [json.loads(line) for line in lines]
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        return "".join(deltas)
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length", "tool_calls")
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@pytest.mark.parametrize("file", BODIES, ids=lambda file: file.stem)
def test_a_body_is_answered(file: Path, ask: Any) -> None:
    case = json.loads(file.read_text())
    route, body = case["route"], {**case["body"], "seed": 1, "stream": False}
    body.pop("stream_options", None)
    reply = ask(route, body, case["headers"])
    assert reply.status_code == 200, reply.text
    ignored = reply.headers.get("x-s1engine-ignored", "")
    assert sorted(filter(None, ignored.split(", "))) == sorted(case["ignored"])
    text, cut = answer_of(route, reply.json())
    assert text.strip() or cut
    if case["expected"] == "json":
        assert isinstance(json.loads(text), dict)
    streamed = ask(route, {**case["body"], "seed": 1, "stream": True}, case["headers"])
    assert streamed.status_code == 200, streamed.text
    assert streamed_answer(route, streamed.text) == text
