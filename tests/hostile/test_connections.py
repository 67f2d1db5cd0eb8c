"""What a client may send outside a body, and how slowly, without a key."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from s1engine.server.http_protocol import BoundedProtocol

LIMIT = 4096
PIECE = b"a" * 2**16
WAIT_S = 20.0


class SmallProtocol(BoundedProtocol):
    """Bounds that a test reaches at once."""

    max_connections = 4
    max_header_bytes = LIMIT
    head_s = body_pause_s = read_pause_s = 0.2
    body_s = 2.0

    def pause_writing(self) -> None:
        UNSENT.append(self.transport.get_write_buffer_size())
        super().pause_writing()


UNSENT: list[int] = []  # bytes in a transport, whenever there were any
BEGUN = threading.Semaphore(0)  # large responses


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and answers with its length; two paths answer with more."""
    if scope["type"] == "http" and scope["path"] != "/":
        await send_much(scope["path"], receive, send)
        return
    size, more = 0, scope["type"] == "http"
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": body})


async def send_much(path: str, receive: Receive, send: Send) -> None:
    """One body of 16 MiB, pieces without end, or none until the client leaves."""
    BEGUN.release()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if path == "/waiting":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    while True:
        body = PIECE * 256 if (whole := path == "/whole") else PIECE
        await send({"type": "http.response.body", "body": body, "more_body": not whole})
        if whole:
            return
        disconnected = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        if disconnected.done() and disconnected.result()["type"] == "http.disconnect":
            return
        disconnected.cancel()


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(
        app, port=0, http=SmallProtocol, lifespan="off", log_config=None, timeout_keep_alive=60
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield server
    server.should_exit = True
    thread.join(WAIT_S)


@pytest.fixture(scope="module")
def port(server: uvicorn.Server) -> int:
    number: int = server.servers[0].sockets[0].getsockname()[1]
    return number


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), WAIT_S)
    connection.settimeout(WAIT_S)
    return connection


def answer_to(port: int, *parts: bytes) -> bytes:
    """What comes back until the server closes, or the answer's body is there."""
    received = b""
    with connect(port) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while b"\r\n0\r\n\r\n" not in received and (data := connection.recv(65536)):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_chunked_body_arrives(port: int) -> None:
    chunks = b"1\r\na\r\n" * LIMIT  # more framing than may stand between two chunks
    assert b"4096" in answer_to(port, HEAD + chunks + b"0\r\nTrailer: a\r\n\r\n")


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET / HTTP/1.1\r\n" + b"A: " + b"a" * 2 * LIMIT + b"\r\n\r\n",),
        (b"GET / HTTP/1.1\r\n", *[b"A: a\r\n"] * LIMIT),
        (b"GET /" + b"a" * 2 * LIMIT + b" HTTP/1.1\r\n\r\n",),
        (HEAD, b"1\r\na\r\n0\r\n", *[b"T: " + b"a" * 100 + b"\r\n"] * LIMIT),
        (HEAD, b"1;" + b"a" * 2 * LIMIT, b"a" * 2 * LIMIT),
    ],
    ids=["header", "headers", "target", "trailers", "chunk extension"],
)
def test_bytes_outside_a_body_are_bounded(port: int, parts: tuple[bytes, ...]) -> None:
    assert b"200" not in answer_to(port, *parts)


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n", HEAD, HEAD + b"5\r\na"],
    ids=["nothing", "half a line", "half a head", "no body", "half a chunk"],
)
def test_a_client_that_sends_nothing_more_is_dropped(port: int, begun: bytes) -> None:
    assert answer_to(port, begun) == b""


def test_connections_above_the_limit_are_closed(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n"
    held = [connect(port) for _ in range(SmallProtocol.max_connections)]
    try:
        for connection in held:
            connection.sendall(head)
        assert answer_to(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == b""
    finally:
        for connection in held:
            connection.close()


def unread(port: int, request: bytes, *, half_closed: bool = False) -> socket.socket:
    """A connection with a request, whose response has begun and is not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(WAIT_S)
    connection.connect(("127.0.0.1", port))
    connection.sendall(request)
    if half_closed:
        connection.shutdown(socket.SHUT_WR)
    assert BEGUN.acquire(timeout=WAIT_S)
    return connection


def wait_until_none_is_left(server: uvicorn.Server) -> None:
    end = time.monotonic() + WAIT_S
    while server.server_state.connections or server.server_state.tasks:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("path", [b"/endless", b"/whole"])
def test_a_response_that_is_not_read_is_dropped(
    server: uvicorn.Server, port: int, path: bytes, half_closed: bool
) -> None:
    request = b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    with unread(port, request, half_closed=half_closed):
        wait_until_none_is_left(server)


def test_a_response_is_held_in_the_application(server: uvicorn.Server, port: int) -> None:
    """No more than one piece waits in the transport."""
    UNSENT.clear()
    with unread(port, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n"):
        wait_until_none_is_left(server)
    assert max(UNSENT) < 2 * len(PIECE)


def test_a_client_that_leaves_is_noticed_behind_another_request(
    server: uvicorn.Server, port: int
) -> None:
    request = b"GET /waiting HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(request + b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(1) and BEGUN.acquire(timeout=WAIT_S)
    wait_until_none_is_left(server)


def test_requests_behind_another_are_bounded(port: int) -> None:
    many = b"GET / HTTP/1.1\r\n\r\n" * 10**4
    few = b"GET / HTTP/1.1\r\n\r\n" * 4
    assert answer_to(port, few).count(b"200 OK") >= 1
    assert answer_to(port, many).count(b"200 OK") <= 2 * SmallProtocol.max_pipelined
