"""The router's HTTP client and a replica's gate, over a real connection."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from s1engine.errors import RequestError
from s1engine.server.router.proxy import (
    ForwardedRequest,
    ReplicaAddress,
    ReplicaClient,
    ReplicaLostError,
    forwarded_request,
    open_session,
)
from s1engine.server.router.replica import create_server
from s1engine.server.router.replica_gate import CLIENT, ReplicaGate, current_response
from s1engine.server.router.tls import tls_files

pytest.importorskip("aiohttp", reason="replicas need it: pip install 's1engine[ray]'")

HOST, TOKEN = "127.0.0.1", "token-of-the-cluster"
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}
Application = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]


def body(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def begin() -> None:
    """Mark the response as begun, as the engine does."""
    response = current_response.get()
    assert response is not None
    response.begun = True


async def read(receive: Any) -> bytes:
    text, more = b"", True
    while more:
        message = await receive()
        text, more = text + message["body"], message.get("more_body", False)
    return text


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Send the body in pieces of three bytes, then the path."""
    asked = await read(receive)
    await send(START)
    begin()
    for at in range(0, len(asked), 3):
        await send(body(asked[at : at + 3]))
        await asyncio.sleep(0)
    await send(body(scope["path"].encode(), more=False))


async def until_disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclasses.dataclass
class Pair:
    """A replica's end of the connection and the router's."""

    gate: ReplicaGate
    server: uvicorn.Server
    client: ReplicaClient
    port: int

    async def whole(self, asked: bytes = b"", target: str = "/") -> list[Message]:
        return [message async for message in self.client.forward(request(asked, target))]


def request(asked: bytes = b"", target: str = "/", **fields: Any) -> ForwardedRequest:
    return ForwardedRequest("POST", target, fields.get("headers", [(b"x", b"y")]), asked)


@contextlib.asynccontextmanager
async def connected(
    app: Application, dead: bool = False, token: str = TOKEN
) -> AsyncGenerator[Pair, None]:
    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # uvicorn then knows that there is no lifespan
        await app(scope, receive, send)

    gate = ReplicaGate(without_lifespan, TOKEN, lambda: dead)
    server = create_server(gate, HOST)
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with open_session(tls_files()) as session:
        https = tls_files() is not None
        client = ReplicaClient(ReplicaAddress("r", HOST, port), session, token, https=https)
        yield Pair(gate, server, client, port)
    server.should_exit = True
    await serving


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def echoing() -> Iterator[tuple[asyncio.Runner, Pair]]:
    """A loop and a pair for all examples of a property."""
    with asyncio.Runner() as runner:
        manager = connected(echo)
        yield runner, runner.run(manager.__aenter__())
        runner.run(manager.__aexit__(None, None, None))


@given(asked=st.lists(st.binary(max_size=40), min_size=1, max_size=8))
def test_every_request_gets_its_own_response(
    asked: list[bytes], echoing: tuple[asyncio.Runner, Pair]
) -> None:
    runner, pair = echoing

    async def play() -> None:
        paths = [f"/{i}" for i in range(len(asked))]
        found = await asyncio.gather(*map(pair.whole, asked, paths))
        for messages, text, path in zip(found, asked, paths, strict=True):
            assert messages[0]["headers"] == [(b"a", b"b"), (b"x-replica", b"r")]
            assert b"".join(m["body"] for m in messages[1:]) == text + path.encode()
            assert [m["more_body"] for m in messages[1:]][-1] is False
            assert all(m["more_body"] for m in messages[1:-1])
        assert pair.client.num_in_flight == 0
        await until(lambda: pair.gate.num_in_flight == 0)

    runner.run(asyncio.wait_for(play(), 20))


def test_large_bodies_arrive() -> None:
    async def count(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"%d" % len(await read(receive)), more=False))

    async def play() -> None:
        async with connected(count) as pair:
            assert (await pair.whole(b"x" * 2**22))[-1]["body"] == b"%d" % 2**22

    run(play())


def test_a_response_waits_for_the_engine_to_begin_and_then_what_was_held_is_sent() -> None:
    begun, more = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send(body(b"held "))
        await begun.wait()
        begin()
        await send(body(b"first"))
        await more.wait()

    async def play() -> None:
        async with connected(app) as pair:
            response = pair.client.forward(request())
            first = asyncio.ensure_future(anext(response))
            await asyncio.sleep(0.1)
            assert not first.done()
            begun.set()
            assert (await first)["type"] == "http.response.start"
            text = b""
            while text != b"held first":
                text += (await anext(response))["body"]
            more.set()
            await response.aclose()

    run(play())


def test_what_is_consumed_slowly_is_joined() -> None:
    async def play() -> None:
        async with connected(echo) as pair:
            response = pair.client.forward(request(b"x" * 3000, "/end"))
            await anext(response)
            await asyncio.sleep(0.3)
            rest = [message async for message in response]
            assert len(rest) <= 2
            assert b"".join(m["body"] for m in rest).endswith(b"xxx/end")

    run(play())


def test_a_slow_client_stops_the_replica_from_sending() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        begin()
        await send(START)
        for _ in range(2**12):  # it ends some time after the client has left
            await send(body(b"x" * 2**16))
            await asyncio.sleep(0)
            sent += 2**16

    async def play() -> None:
        async with connected(app) as pair:
            response = pair.client.forward(request())
            await anext(response)
            await asyncio.sleep(0.3)
            before = sent
            await asyncio.sleep(0.3)
            assert 0 < before == sent < 2**26
            received = 0
            while received <= before:
                received += len((await anext(response))["body"])
            assert sent > before
            await response.aclose()

    run(play())


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_engine_that_had_not_begun_is_named_to_be_avoided(dead: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 503})
        await send(body(b"", more=False))

    async def play() -> None:
        async with connected(app, dead) as pair:
            if dead:
                with pytest.raises(ReplicaLostError) as lost:
                    await pair.whole()
                assert lost.value.name == "r"
            else:
                assert (await pair.whole())[0]["status"] == 503
            assert pair.client.closed == dead

    run(play())


@pytest.mark.parametrize("begins", [True, False])
def test_a_client_that_leaves_ends_the_work(begins: bool) -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        if begins:
            begin()
            await send(body(b"x"))
        await until_disconnected(receive)
        ended.set()

    async def play() -> None:
        async with connected(app) as pair:
            response = pair.client.forward(request())
            first = asyncio.ensure_future(anext(response))
            await until(lambda: pair.gate.num_in_flight == 1 and first.done() == begins)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await response.aclose()
            await ended.wait()
            await until(lambda: pair.gate.num_in_flight == 0)
            assert pair.client.num_in_flight == 0

    run(play())


@pytest.mark.parametrize("length", [[], [(b"content-length", b"9")]])
def test_a_truncated_response_is_an_error_not_an_end(length: list[tuple[bytes, bytes]]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        begin()
        await send({**START, "headers": length})
        await send(body(b"some"))
        await until_disconnected(receive)

    async def play() -> None:
        async with connected(app) as pair:
            response = pair.client.forward(request())
            assert (await anext(response))["type"] == "http.response.start"
            assert (await anext(response))["body"] == b"some"
            for connection in list(pair.server.server_state.connections):
                connection.transport.close()
            with pytest.raises(ReplicaLostError) as lost:
                await anext(response)
            assert lost.value.name == "r" and not pair.client.closed

    run(play())


def test_a_replica_that_is_gone_takes_no_more() -> None:
    async def play() -> None:
        async with connected(echo) as pair:
            await pair.whole()
            await pair.server.shutdown()
            with pytest.raises(ReplicaLostError):
                await pair.whole()
            with pytest.raises(ReplicaLostError):
                await pair.whole()
            assert pair.client.closed

    run(play())


def test_a_replica_that_drains_finishes_and_is_avoided() -> None:
    finish = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        if scope["path"] == "/":
            await finish.wait()
        await send(body(b"done", more=False))

    async def play() -> None:
        async with connected(app) as pair:
            asked = asyncio.ensure_future(pair.whole())
            await until(lambda: pair.gate.num_in_flight == 1)
            pair.gate.draining = True
            for target in ("/", "/health", "/v1/models"):
                with pytest.raises(ReplicaLostError):
                    await pair.whole(target=target)
            assert pair.client.closed
            for target in ("/metrics", "/v1/requests/x/end_thinking"):
                assert (await pair.client.fetch("GET", target)) == (200, b"done")
            finish.set()
            assert (await asked)[-1]["body"] == b"done"

    run(play())


def test_a_node_that_vanishes_is_noticed_by_the_kernel() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        begin()
        await send(START)
        await send(body(b"x"))
        await until_disconnected(receive)

    async def play() -> None:
        async with connected(app) as pair:
            response = pair.client.forward(request())
            await anext(response)
            connector = pair.client._session.connector
            assert connector is not None
            (connection,) = connector._acquired
            assert connection.transport is not None
            tcp = connection.transport.get_extra_info("socket")
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 10
            await response.aclose()

    run(play())


# --- the token ---


@pytest.mark.parametrize("header", ["", "authorization: Bearer guessed\r\n", "x-api-key: k\r\n"])
def test_without_the_token_a_request_is_refused_before_its_body(header: str) -> None:
    called = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    async def play() -> None:
        async with connected(app) as pair:
            reader, writer = await asyncio.open_connection(HOST, pair.port)
            head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n{header}\r\n"
            writer.write(head.encode())
            answer = await reader.read()  # to its end: the connection is closed
            assert answer.startswith(b"HTTP/1.1 401") and b"invalid_token" in answer
            assert TOKEN.encode() not in answer
            writer.close()
            assert not called

    run(play())


def test_a_router_with_another_token_gets_nowhere() -> None:
    async def play() -> None:
        async with connected(echo, token="guessed") as pair:
            assert (await pair.whole())[0]["status"] == 401

    run(play())


# --- headers ---


def scope_of(*headers: tuple[bytes, bytes], **fields: Any) -> dict[str, Any]:
    state = {"request_id": "mine", "client": "1"}
    base = {"method": "POST", "path": "/", "query_string": b"", "headers": headers, "state": state}
    return {**base, **fields}


def test_only_a_clients_own_headers_pass_and_none_can_be_forged() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        headers = [(b"connection", b"x-hop, keep-alive"), (b"x-hop", b"1"), (b"x-request-id", b"0")]
        headers += [(b"x-s1engine-internal-x", b"1"), (b"server", b"s")]
        headers += [(b"retry-after", b"3"), (b"x-s1engine-ignored", b"y")]
        await send({**START, "headers": headers})
        await send(body(b"", more=False))

    async def play() -> None:
        forged = [
            (CLIENT, b"9"),
            (b"X-S1engine-Internal-Not-Begun", b"1"),
            (b"x-request-id", b"forged"),
        ]
        secret = [(b"authorization", b"Bearer key"), (b"x-api-key", b"key")]
        hops = [(b"connection", b"X-Mine, close"), (b"x-mine", b"1"), (b"te", b"trailers")]
        hops += [(b"transfer-encoding", b"chunked"), (b"expect", b"100-continue"), (b"host", b"h")]
        own = [(b"traceparent", b"00-1"), (b"accept", b"a"), (b"accept", b"\xc3\xa9")]
        scope = scope_of(*forged, *secret, *hops, *own, (b"x-latin", b"\xe9"))
        async with connected(app) as pair:
            start, _ = [m async for m in pair.client.forward(forwarded_request(scope, b"{}"))]
        passed = [(b"retry-after", b"3"), (b"x-s1engine-ignored", b"y"), (b"x-replica", b"r")]
        assert start["headers"] == passed
        (got,) = seen
        assert got["state"]["client"] == "1"
        values = {name: [v for n, v in got["headers"] if n == name] for name, _ in got["headers"]}
        assert values.pop(b"authorization") == [b"Bearer " + TOKEN.encode()]
        assert values.pop(b"x-request-id") == [b"mine"] and values.pop(CLIENT) == [b"1"]
        assert values.pop(b"accept") == [b"a", b"\xc3\xa9"]
        assert values.pop(b"host") == [f"{HOST}:{pair.port}".encode()]
        assert values == {b"traceparent": [b"00-1"], b"content-length": [b"2"]}

    run(play())


@pytest.mark.parametrize(
    ("path", "query"),
    [(b"/v1/models/a%2Fb", b"x=%20&y=+"), (b"//x/../y", b""), (b"/", b"a?b=\xe9"), (b"*", b"")],
)
def test_paths_and_queries_pass_unchanged(path: bytes, query: bytes) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send(START)
        await send(body(b"", more=False))

    async def play() -> None:
        scope = scope_of(raw_path=path, query_string=query)
        async with connected(app) as pair:
            async for _ in pair.client.forward(forwarded_request(scope, b"")):
                pass
        (got,) = seen
        assert got["raw_path"].lstrip(b"/") == path.lstrip(b"/")
        assert got["query_string"] == query.replace(b"\xe9", b"%E9")

    run(play())


# --- TLS ---


@pytest.fixture
def certificates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tls_utils = pytest.importorskip("ray._common.tls_utils")
    for name, text in zip(("cert", "key"), tls_utils.generate_self_signed_tls_certs(), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    for name, file in (("SERVER_CERT", "cert"), ("SERVER_KEY", "key"), ("CA_CERT", "cert")):
        monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / file))


def test_where_ray_speaks_tls_so_does_the_proxy_and_both_ends_show_certificates(
    certificates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with connected(echo) as pair:
            assert (await pair.whole(b"secret"))[-1]["body"].endswith(b"/")
            monkeypatch.delenv("RAY_USE_TLS")
            address = ReplicaAddress("r", HOST, pair.port)
            async with open_session(None) as session:
                for https in (False, True):
                    client = ReplicaClient(address, session, TOKEN, https=https)
                    with pytest.raises(ReplicaLostError):
                        await client.fetch("GET", "/")
            import ssl

            import aiohttp

            anonymous = ssl.create_default_context()
            anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
            connector = aiohttp.TCPConnector(ssl=anonymous)
            async with aiohttp.ClientSession(connector=connector) as session:
                client = ReplicaClient(address, session, TOKEN, https=True)
                with pytest.raises(ReplicaLostError):
                    await client.fetch("GET", "/")

    run(play())


@pytest.mark.parametrize("name", ["RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"])
def test_a_missing_variable_of_tls_is_named(
    name: str, certificates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(RequestError, match=f"^RAY_USE_TLS is set, but {name} is not$"):
        tls_files()
    monkeypatch.setenv(name, "/nowhere")
    with pytest.raises(RequestError, match=f"^{name}: there is no file '/nowhere'$"):
        tls_files()
