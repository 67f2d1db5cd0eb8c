"""How a server process ends: in order after SIGTERM, with an error if its engine is killed."""

import asyncio
import contextlib
import fcntl
import gc
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from s1engine import cli
from s1engine.cli.serve import listen
from s1engine.server.admission import Admission, ClientLimits
from s1engine.server.serving import DrainingServer
from tests.server.conftest import Served, launch_server, start_server

CHAT = "/v1/chat/completions"
LONG = {
    "messages": [{"role": "user", "content": "a=1 b=a+1 b?"}],
    "min_thinking_tokens": 1800,
    "wait_text": "",
    "stream": True,
}
SHORT = {**LONG, "min_thinking_tokens": 0}


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    process, url, _ = start_server("--dtype", "float32", *flags)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def engine_of(process: subprocess.Popen[str]) -> int:
    """The server's one child."""
    (child,) = children_of(process.pid)
    return child


def children_of(pid: int) -> list[int]:
    """Oldest first, of each thread."""
    files = sorted(Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for file in files for child in file.read_text().split()]


class Stream:
    """A stream read by a thread of its own; ``begun`` is set at its first event."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self.events: list[Any] = []
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(client, body))
        self._thread.start()
        assert self.begun.wait(60)

    def _read(self, client: httpx.Client, body: dict[str, Any]) -> None:
        with (
            contextlib.suppress(httpx.HTTPError),  # the server may be killed
            client.stream("POST", CHAT, json=body) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.begun.set()

    def join(self) -> list[Any]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.events


def health(client: httpx.Client) -> int:
    return client.get("/health").status_code


def test_an_idle_connection_outlives_the_clients_own_limit(served: Served) -> None:
    """Clients close idle connections after 5 seconds (httpx) or later. If the server closed them
    first, a request sent at that moment would be lost."""
    address = served.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=30)
    for pause in (6, 0):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200 and connection.sock is not None
        time.sleep(pause)
        readable, _, _ = select.select([connection.sock], [], [], 0)
        assert not readable, "the server closed the connection"
    connection.close()


def start_unread(*flags: str, **env: str) -> tuple[subprocess.Popen[str], str, int]:
    """A server that logs into a pipe of one page, which is read only until it listens."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    env["S1ENGINE_LOG_LEVEL"] = "debug"
    process = launch_server(writer, writer, "--dtype", "float32", *flags, **env)
    os.close(writer)
    log = b""
    while not (found := re.search(rb"running on (http://\S+)", log)):
        log += os.read(reader, 4096)
    return process, found.group(1).decode(), reader


def test_a_killed_engine_ends_a_server_whose_log_is_not_read(tmp_path: Path) -> None:
    """Unhealthy at once. All lines of a request, of the access log and of each step of the engine
    go into a full pipe. systemd hears of the start, of the loop's ticks and of the end."""
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.settimeout(60)
    systemd.bind(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    process, url, reader = start_unread("--engine-restarts", "0", **env)
    states: list[bytes] = []

    def listen() -> None:
        while b"STOPPING=1" not in states:
            states.append(systemd.recv(100))

    listener = threading.Thread(target=listen)
    listener.start()
    with httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post(CHAT, json={**LONG, "stream": False}).json()
        assert whole["usage"]["completion_tokens"] > 1800  # a line for most
        stream = Stream(client, LONG)
        assert health(client) == 200
        os.kill(engine_of(process), signal.SIGKILL)
        assert stream.join()[-1]["error"]["code"] == "engine_dead"
        assert health(client) == 503
        refused = client.post(CHAT, json=SHORT)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_dead"
        assert process.wait(60) == 3
    listener.join(60)
    systemd.close()
    ready, *ticks, stopping = states
    assert (ready, set(ticks), stopping) == (b"READY=1", {b"WATCHDOG=1"}, b"STOPPING=1")
    assert select.select([reader], [], [], 0)[0]
    os.close(reader)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_port_in_use_is_reported_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], host: str
) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no IPv6")
    with taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no/such/model", "--host", host, "--port", str(port)]) == 1
    message = capsys.readouterr().err
    assert f"cannot listen on {host} port {port}" in message and "in use" in message
    free = listen(host, port)  # at once
    assert {listener.getsockname()[1] for listener in free} == {port}
    for listener in free:
        listener.close()


def test_sigterm_while_loading_leaves_no_process_behind() -> None:
    process = launch_server(subprocess.PIPE, None)
    while not children_of(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_sigterm_ends_what_runs_too_long_with_an_error() -> None:
    process, url, log = start_server("--dtype", "float32", "--shutdown-timeout", "0.1")
    with httpx.Client(base_url=url, timeout=60) as client:
        stream = Stream(client, LONG)
        process.send_signal(signal.SIGTERM)
        assert stream.join()[-1]["error"]["code"] == "shutdown"
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(log)


def test_a_connection_made_while_the_model_loads_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = launch_server(subprocess.DEVNULL, None, "--port", str(port))
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                early = socket.create_connection(("127.0.0.1", port))
                break
            assert process.poll() is None
            time.sleep(0.005)
        early.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert early.recv(100).startswith(b"HTTP/1.1 200")
        early.close()
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_sigterm_finishes_the_open_request_and_rejects_new_ones() -> None:
    with serving("--shutdown-timeout", "120") as (process, client):
        engine = engine_of(process)
        stream = Stream(client, LONG)
        process.send_signal(signal.SIGTERM)
        while health(client) == 200:
            time.sleep(0.01)
        refused = client.post(CHAT, json=SHORT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "shutting_down"
        events = stream.join()
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(60) == 0
        assert not Path(f"/proc/{engine}").exists()


def test_a_dead_engine_is_replaced_and_a_killed_server_leaves_no_process_behind() -> None:
    with serving("--shutdown-timeout", "0") as (process, client):
        whole = {**SHORT, "stream": False, "structured_outputs": {"regex": "[0-9]{1,3}"}}
        answer = client.post(CHAT, json=whole).json()["choices"]
        children = children_of(process.pid)
        assert len(children) == 2  # one tries grammars
        engine = children[0]
        stream = Stream(client, LONG)
        os.kill(engine, signal.SIGKILL)
        assert stream.join()[-1]["error"]["code"] == "engine_dead"
        refused = client.post(CHAT, json=SHORT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        while health(client) == 503:  # the port is kept
            time.sleep(0.05)
        assert client.post(CHAT, json=whole).json()["choices"] == answer
        assert re.search(
            r"^s1engine:engine_restarts_total{.*} 1", client.get("/metrics").text, re.M
        )
        left = {engine, *children, *children_of(process.pid)}
        assert len(left) == 3
        Stream(client, LONG)
        process.kill()
        while any(is_alive(pid) for pid in left):
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_collector_leaves_a_started_server_alone() -> None:
    """A full collection would visit every object of every module, in the midst of requests."""
    loaded: list[Any] = []
    reachable: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Answers nothing."""

    class Ending(DrainingServer):
        async def main_loop(self) -> None:
            reachable.append(any(found is loaded for found in gc.get_objects()))

    backend: Any = SimpleNamespace(failure=None)
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None)
    try:
        asyncio.run(Ending(config, backend, Admission(ClientLimits(max_in_flight=1)), 0).serve())
    finally:
        gc.unfreeze()
    assert reachable == [False]
