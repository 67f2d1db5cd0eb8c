"""Lines and doors: what an application says behind a door comes out of the line to it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.server import door as doors
from s1engine.server.door import Door, outbox
from s1engine.server.line import Line, Place, ReplicaLostError
from s1engine.server.wire import HELLO_BYTES, Message

HOST = "127.0.0.1"
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}
Application = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]


def body(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def scope(path: str = "/") -> Message:
    return {"method": "POST", "path": path, "query_string": b"", "headers": [(b"x", b"y")]}


def begin() -> None:
    """The engine has begun."""
    said = outbox.get()
    assert said is not None
    said.begin()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The body in pieces of three bytes, then the path."""
    asked = (await receive())["body"]
    await send(START)
    begin()
    for at in range(0, len(asked), 3):
        await send(body(asked[at : at + 3]))
        await asyncio.sleep(0)
    await send(body(scope["path"].encode(), more=False))


@contextlib.asynccontextmanager
async def connected(app: Application, dead: bool = False) -> AsyncGenerator[tuple[Door, Line]]:
    door = Door(app, lambda: dead, "a")
    place = Place("a", HOST, await door.open(HOST), door.secret)
    line = Line(place, lambda: None)
    await line.connect()
    yield door, line
    line.close()
    await door.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def whole(line: Line, asked: bytes, path: str = "/") -> list[Message]:
    return [m async for messages in line.answer(scope(path), asked) for m in messages]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "IDLE_S", 0.01)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8))
def test_every_call_gets_its_own_answer(asked: list[bytes]) -> None:
    doors.IDLE_S = 0.0

    async def play() -> None:
        async with connected(echo) as (door, line):
            paths = [f"/{i}" for i in range(len(asked))]
            found = await asyncio.gather(*map(whole, [line] * len(asked), asked, paths))
            for messages, text, path in zip(found, asked, paths, strict=True):
                assert messages[0]["headers"] == [[b"a", b"b"], [b"x-replica", b"a"]]
                assert b"".join(m["body"] for m in messages[1:]) == text + path.encode()
                assert not messages[-1]["more_body"]
            assert line.under_way == door.under_way == 0

    run(play())


def test_nothing_goes_before_the_engine_has_begun_and_then_what_was_held() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await go.wait()
        begin()
        await asyncio.Event().wait()

    async def play() -> None:
        async with connected(app) as (_, line):
            answer = line.answer(scope(), b"")
            first = asyncio.ensure_future(anext(answer))
            await asyncio.sleep(0.05)
            assert not first.done()
            go.set()
            assert [m["type"] for m in await first] == ["http.response.start"]
            await answer.aclose()

    run(play())


def test_what_is_taken_slowly_is_joined() -> None:
    async def play() -> None:
        async with connected(echo) as (_, line):
            answer = line.answer(scope("/end"), b"x" * 3000)
            await anext(answer)
            await asyncio.sleep(0.2)
            rest = [messages async for messages in answer]
            assert len(rest) <= 2
            text = b"".join(m.get("body", b"") for messages in rest for m in messages)
            assert text.endswith(b"xxx/end")

    run(play())


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_engine_that_had_not_begun_is_named_to_be_avoided(dead: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 503})
        await send(body(b"", more=False))

    async def play() -> None:
        async with connected(app, dead) as (_, line):
            if dead:
                with pytest.raises(ReplicaLostError) as lost:
                    await whole(line, b"")
                assert lost.value.name == "a"
            else:
                assert (await whole(line, b""))[0]["status"] == 503

    run(play())


def test_who_leaves_ends_the_work() -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        begin()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def play() -> None:
        async with connected(app) as (door, line):
            answer = line.answer(scope(), b"")
            await anext(answer)
            assert door.under_way == 1
            await answer.aclose()
            await ended.wait()
            while door.under_way:
                await asyncio.sleep(0.01)

    run(play())


def test_a_lost_connection_ends_its_calls_and_takes_no_more() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        begin()
        await asyncio.Event().wait()

    async def play() -> None:
        async with connected(app) as (door, line):
            answer = line.answer(scope(), b"")
            await anext(answer)
            for guest in list(door.guests):
                guest.wire.close()
            with pytest.raises(ReplicaLostError) as lost:
                await anext(answer)
            assert lost.value.name is None
            with pytest.raises(ReplicaLostError):
                await whole(line, b"")
            while door.under_way:
                await asyncio.sleep(0.01)

    run(play())


def test_a_door_that_closes_says_so_and_answers_what_it_was_asked() -> None:
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await go.wait()
        await send(body(b"done", more=False))

    async def play() -> None:
        async with connected(app) as (door, line):
            asked = asyncio.ensure_future(whole(line, b""))
            while not door.under_way:
                await asyncio.sleep(0.01)
            closing = asyncio.ensure_future(door.close())
            while not line.closing:
                await asyncio.sleep(0.01)
            assert not closing.done()
            go.set()
            assert (await asked)[-1]["body"] == b"done"
            await closing

    run(play())


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 2 * HELLO_BYTES, b""])
def test_nobody_is_let_in_without_the_secret(said: bytes) -> None:
    async def play() -> None:
        called = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            called.append(scope)

        async with connected(app) as (door, line):
            wrong = replace(line._place, secret=b"guessed")
            with pytest.raises(OSError, match="does not let us in"):
                await Line(wrong, lambda: None).connect()
            if said:
                reader, writer = await asyncio.open_connection(HOST, line._place.port)
                writer.write(said)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            assert len(door.guests) == 1 and not called

    run(play())


def test_where_ray_speaks_tls_so_do_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificates = pytest.importorskip("ray._common.tls_utils")
    texts = certificates.generate_self_signed_tls_certs()
    for name, text in zip(("cert", "key"), texts, strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    for name, file in (("SERVER_CERT", "cert"), ("SERVER_KEY", "key"), ("CA_CERT", "cert")):
        monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / file))

    async def play() -> None:
        async with connected(echo) as (_, line):
            assert (await whole(line, b"secret"))[-1]["body"].endswith(b"/")
            monkeypatch.delenv("RAY_USE_TLS")
            with pytest.raises(OSError):
                await Line(line._place, lambda: None).connect()

    run(play())
