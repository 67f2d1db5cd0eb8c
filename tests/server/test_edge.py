"""What a client meets before any model: routes, methods, content types, keys, origins, the page of
the routes, and the log of what is refused."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from s1engine.cli import main
from s1engine.server.app import create_app
from s1engine.server.docs_page import docs_page
from tests.server.conftest import KEY
from tests.server.tool_script import CHAT

ORIGIN = "https://chat.example.com"
Test = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def app(llm: Any) -> Any:
    """The application over an engine that never runs."""

    class Idle:
        config, compiler = llm.engine.config, llm.engine.compiler
        healthy, failure = True, None

        def stats(self) -> Any:
            return llm.engine.stats()

        def end_thinking(self, name: str) -> bool:
            return False

    return create_app(Idle(), api_keys=[KEY], allowed_origins=[ORIGIN])  # type: ignore[arg-type]


def run(app: Any, test: Test) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", headers=headers
        ) as http:
            await test(http)

    asyncio.run(main())


def test_a_path_without_a_route_names_those_that_exist(app: Any) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        for path, meant in (
            ("/chat/completions", "/v1/chat/completions"),
            ("/v1/v1/models", "/v1/models"),
            ("/v1/chat/completions/", "/v1/chat/completions"),
        ):
            answer = await http.post(path, json={}, follow_redirects=False)
            assert answer.status_code in (404, 307)
            if answer.status_code == 404:
                assert f"did you mean {meant}?" in answer.json()["error"]["message"]
        message = (await http.get("/v2/nothing")).json()["error"]["message"]
        assert "/v1/chat/completions, " in message and "/tokenize" in message
        wrong = await http.get("/v1/chat/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        assert "is for POST, not GET" in wrong.json()["error"]["message"]

    run(app, test)


@pytest.mark.parametrize("path", ["/health", "/", "/docs", "/version", "/metrics", "/v1/models"])
def test_head_answers_as_get(app: Any, path: str) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        head, get = await http.head(path), await http.get(path)
        assert head.status_code == get.status_code == 200
        assert head.headers.get("content-type") == get.headers.get("content-type")

    run(app, test)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "a", ""])
def test_a_body_that_is_not_said_to_be_json_is_415(app: Any, kind: str | None) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        headers = {} if kind is None else {"content-type": kind}
        for path in ("/v1/chat/completions", "/v1/messages", "/tokenize"):
            answer = await http.post(path, content=b'{"messages": []}', headers=headers)
            assert answer.status_code == 415
            message = answer.json()["error"]["message"]
            assert "Content-Type" in message and "application/json" in message
            assert ("is missing" in message) == (not kind)
        for good in ("application/json", "Application/JSON; charset=utf-8", "application/x+json"):
            headers = {"content-type": good}
            answer = await http.post("/tokenize", content=b'{"prompt": "a"}', headers=headers)
            assert answer.status_code == 200

    run(app, test)


@pytest.mark.parametrize("header", ["Bearer K", "bearer K", "BEARER   K ", "x-api-key"])
def test_a_key_is_found_in_any_spelling(app: Any, header: str) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        for key, status in ((KEY, 200), (KEY[:-1], 401), (f"{KEY}x", 401)):
            given = {"x-api-key": key, "Authorization": ""}
            if header != "x-api-key":
                given = {"Authorization": header.replace("K", key)}
            answer = await http.get("/v1/models", headers=given)
            assert answer.status_code == status, given
        for other in (KEY, f"Basic {KEY}"):
            answer = await http.get("/v1/models", headers={"Authorization": other})
            assert answer.status_code == 401

    run(app, test)


def test_pages_of_allowed_origins_may_ask(app: Any) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        ask = {"access-control-request-method": "POST"}
        ask |= {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
        for origin, allowed in ((ORIGIN, True), ("https://evil.example.com", False)):
            headers = {"origin": origin, "Authorization": ""}
            before = await http.options("/v1/chat/completions", headers={**headers, **ask})
            assert (before.status_code == 200) == allowed
            refused = await http.post("/v1/chat/completions", json={}, headers=headers)
            assert refused.status_code == 401  # readable for the page all the same
            for answer in (before, refused):
                given = answer.headers.get("access-control-allow-origin")
                assert given == (origin if allowed else None)
                assert "access-control-allow-credentials" not in answer.headers

    run(app, test)


def test_every_refusal_has_a_line_in_the_log(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        bodies: list[Any] = [{}, {"messages": CHAT, "temperature": "hot\nline"}, {"messages": []}]
        bodies += [{"messages": CHAT, "model": "x" * 999}]
        for i, body in enumerate(bodies):
            headers = {"x-request-id": f"id-{i}"}
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
            assert answer.status_code in (400, 404)

    with caplog.at_level(logging.WARNING, "s1engine.server"):
        run(app, test)
    lines = [record.getMessage() for record in caplog.records if "refused" in record.message]
    assert [re.search(r"request (\S+):", line)[1] for line in lines] == [  # type: ignore[index]
        f"id-{i}" for i in range(4)
    ]
    assert all(len(line) < 500 and "\n" not in line for line in lines)
    assert "temperature" in lines[1]


def test_the_page_of_the_routes_shows_all_fields_and_loads_nothing(app: Any) -> None:
    schema = app.openapi()
    page = docs_page(schema)
    assert not re.findall(r"<script|<link|https?://", page)
    for path, operations in schema["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert "thinking_token_budget" in page and "Never think longer" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ctx-size", "4096"], "--max-model-len"),
        (["-m", "x"], "MODEL, without a flag"),
        (["--tp", "2"], "--tensor-parallel-size"),
        (["--reasoning-parser", "minimax"], "think-tag"),
    ],
)
def test_flags_of_other_engines_name_ours(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", *flags])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_an_unknown_format_of_calls_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--tool-call-parser", "minimax"]) == 2
    assert "llama3_json" in capsys.readouterr().err


def test_flags_that_ask_for_what_is_done_anyway_pass(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"
    flags += " --swap-space 4 --disable-log-requests --port 999999"
    assert main(["serve", *flags.split()]) == 2
    assert "port must be" in capsys.readouterr().err
    assert "--reasoning-format think-tag" in caplog.text
    assert caplog.text.count("has no effect") == 3
