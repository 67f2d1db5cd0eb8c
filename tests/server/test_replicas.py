"""Two replicas on a local Ray, started once: the single server's answers, and the cost of a death.

The tests run in the order of this file: the first brings the second replica up, the last ones kill
replicas, then end the server.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import KEY, Served, start_server

pytest.importorskip("ray.serve", reason="replicas need Ray: pip install 's1engine[ray]'")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
VOLATILE = {"id", "created", "created_at", "completed_at"}
VOLATILE |= {"cached_tokens", "cache_read_input_tokens", "input_tokens"}
VOLATILE |= {"store"}  # replicas store no response
SETTLE_S = 120
LONG = 1500  # thinking tokens


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    scaled = ("--max-replicas", "2", "--max-num-seqs", "16")
    rest = ("--api-key", KEY, "--dtype", "float32", "--shutdown-timeout", "60")
    process, url, log = start_server(*scaled, *rest)
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=url, headers=headers, timeout=SETTLE_S, limits=limits) as client:
        yield process, client
    process.terminate()
    process.wait(60)
    print("".join(log[-50:]))


@pytest.fixture
def client(server: tuple[subprocess.Popen[str], httpx.Client]) -> httpx.Client:
    return server[1]


def question(i: int) -> str:
    return f"a={i} b=a+{i % 7} b?"


def ask(i: int, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"messages": [{"role": "user", "content": question(i)}]}
    if path == COMPLETIONS:
        shape = {"prompt": question(i)}
    elif path == RESPONSES:
        shape = {"input": question(i)}
    most = {"max_output_tokens" if path == RESPONSES else "max_tokens": 60}
    return {"temperature": 0, **shape, **most, **fields}


def long_ask(i: int, **fields: Any) -> dict[str, Any]:
    """A request that thinks for LONG tokens at least."""
    lasting = {"min_thinking_tokens": LONG, "wait_text": "", "max_tokens": LONG + 200}
    return ask(i, **lasting, **fields)


def together(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(work, items))


def steady(value: Any) -> Any:
    """The value without the fields that differ between two answers."""
    if isinstance(value, dict):
        return {key: steady(one) for key, one in value.items() if key not in VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


def home(answer: httpx.Response) -> str:
    """The replica that answered."""
    return str(answer.headers["x-replica"])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)


class Reading:
    """A stream read to its end by a thread of its own."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self.events: list[dict[str, Any]] = []
        self.last = self.home = ""
        self._thread = threading.Thread(target=self._read, args=(client, body))
        self._thread.start()

    def _read(self, client: httpx.Client, body: dict[str, Any]) -> None:
        with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            self.home = home(answer)
            for line in answer.iter_lines():
                self.last = line or self.last
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def join(self) -> list[dict[str, Any]]:
        self._thread.join(SETTLE_S)
        assert not self._thread.is_alive() and self.last == "data: [DONE]"
        return self.events

    def text(self) -> str:
        """Thinking and answer."""
        deltas = [event["choices"][0]["delta"] for event in self.events if event.get("choices")]
        return "".join(d.get("reasoning") or d.get("content") or "" for d in deltas)


def whole_text(answer: Any) -> str:
    message = answer["choices"][0]["message"]
    return str((message["reasoning"] or "") + (message["content"] or ""))


def test_a_queue_brings_another_replica(
    server: tuple[subprocess.Popen[str], httpx.Client],
) -> None:
    """Overload one engine until another replica is wanted, and again when that runs."""
    _, client = server
    assert client.get("/health").json() == {"replicas": 1, "wanted": 1}

    def load(enough: Callable[[], bool]) -> set[str]:
        """Send requests until ``enough``; return the replicas that answered."""
        homes: set[str] = set()
        end = time.monotonic() + SETTLE_S

        def keep_asking(i: int) -> None:
            while not (enough() or len(homes) == 2) and time.monotonic() < end:
                homes.add(home(client.post(CHAT, json=ask(i, max_tokens=200))))

        together(
            keep_asking, random.Random(1).sample(range(48), 48)
        )  # the last find no room at home
        return homes

    load(lambda: bool(client.get("/health").json()["wanted"] == 2))
    until(
        lambda: client.get("/health").json() == {"replicas": 2, "wanted": 2}
    )  # soon, without load
    assert len(load(lambda: False)) == 2


def listening(pid: int) -> list[str]:
    """Addresses where a process listens, in hexadecimal as /proc has them."""
    texts = [Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6")]
    rows = [line.split() for text in texts for line in text.splitlines()[1:]]
    sockets = {row[9]: row[1].split(":")[0] for row in rows if row[3] == "0A"}
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = [link.removeprefix("socket:[").rstrip("]") for link in links]
    return [sockets[inode] for inode in inodes if inode in sockets]


def test_only_one_port_of_each_replica_listens_beyond_this_machine(
    server: tuple[subprocess.Popen[str], httpx.Client],
) -> None:
    here = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    open_to_all = {}
    for pid in descendants(server[0].pid):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # it has ended
            if places := [place for place in listening(pid) if place not in here]:
                open_to_all[command(pid)] = len(places)
    assert all(name.startswith("ray::ServeReplica") for name in open_to_all), open_to_all
    assert set(open_to_all.values()) == {1}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_answers_are_the_single_servers(path: str, client: httpx.Client, served: Served) -> None:
    def answers(http: httpx.Client) -> list[tuple[int, Any]]:
        done = together(lambda i: http.post(path, json=ask(i, path)), range(10))
        return [(answer.status_code, steady(answer.json())) for answer in done]

    assert answers(client) == answers(served.http)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_streams_are_the_single_servers(path: str, client: httpx.Client, served: Served) -> None:
    """The joined text is compared: chunks are joined where the client reads slowly."""

    def text(http: httpx.Client) -> str:
        return http.post(path, json=ask(3, path, stream=True)).text

    ours, theirs = text(client), text(served.http)
    assert ours.count("\n\n") >= 3
    kinds = [[line for line in t.splitlines() if line.startswith("event:")] for t in (ours, theirs)]
    assert list(dict.fromkeys(kinds[0])) == list(dict.fromkeys(kinds[1]))
    if path == CHAT:
        reading = Reading(client, ask(3))
        reading.join()
        assert reading.text() == whole_text(served.http.post(CHAT, json=ask(3)).json())


def test_everything_else_is_the_single_servers(client: httpx.Client, served: Served) -> None:
    def get(http: httpx.Client, path: str) -> tuple[int, Any]:
        answer = http.get(path)
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status_code, steady(answer.json()) if is_json else answer.text

    for path in ("/", "/version", "/v1/models", "/v1/models/other", "/nothing", "/openapi.json"):
        assert get(client, path) == get(served.http, path), path
    wrong = {"messages": [], "max_tokens": 0}
    for http in (client, served.http):
        refused = http.post(CHAT, json=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"], refused.text
    tokens = [
        http.post("/tokenize", json={"prompt": "ab"}).json() for http in (client, served.http)
    ]
    assert tokens[0] == tokens[1]


def test_the_key_is_asked_for(client: httpx.Client) -> None:
    for path, status in (("/v1/models", 401), ("/metrics", 401), ("/health", 200), ("/", 200)):
        assert httpx.get(client.base_url.join(path)).status_code == status


def test_a_prefix_stays_with_its_replica_until_too_many_are_there(client: httpx.Client) -> None:
    new = range(300, 312)  # questions that no earlier test has placed
    homes = {i: home(client.post(CHAT, json=ask(i))) for i in new}
    assert len(set(homes.values())) == 2
    for i in new:
        turns = [*ask(i)["messages"], {"role": "assistant", "content": "3"}]
        again = {**ask(i), "messages": [*turns, {"role": "user", "content": "b?"}]}
        assert home(client.post(CHAT, json=again)) == homes[i]
    few = together(lambda _: home(client.post(CHAT, json=ask(new[0]))), range(8))
    assert set(few) == {homes[new[0]]}
    many = together(lambda _: home(client.post(CHAT, json=ask(new[0], max_tokens=200))), range(60))
    assert set(many) == set(homes.values())


def test_ending_the_thinking_reaches_the_replica(client: httpx.Client) -> None:
    reading = Reading(client, long_ask(2, n=8, stream_options={"include_usage": True}))
    until(lambda: bool(reading.events))
    name = reading.events[0]["id"]
    assert client.post(f"/v1/requests/{name}/end_thinking").json()["ending"]
    used = reading.join()[-1]["usage"]["thinking"]
    assert used["end_reason"] == "client" and used["tokens"] < 8 * LONG
    assert client.post(f"/v1/requests/{name}/end_thinking").status_code == 404


def gauges(client: httpx.Client, name: str) -> dict[str, float]:
    """A metric by replica."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    (family,) = [family for family in families if family.name == name]
    return {sample.labels["replica"]: sample.value for sample in family.samples}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(client: httpx.Client, stream: bool) -> None:
    def running() -> float:
        return sum(gauges(client, "s1engine:num_requests_running").values())

    until(lambda: running() == 0)
    body = {**long_ask(4), "stream": stream, "n": 4}
    with httpx.Client(base_url=client.base_url, headers=client.headers) as leaving:
        if stream:
            with leaving.stream("POST", CHAT, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(CHAT, json=body, timeout=0.2)
    before = sum(gauges(client, "s1engine:computed_tokens").values())
    until(lambda: running() == 0)
    assert sum(gauges(client, "s1engine:computed_tokens").values()) - before < 4 * LONG / 2


# --- deaths ---


def descendants(pid: int) -> list[int]:
    """Processes that any of its threads started, and theirs."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in texts for child in text.split()]
    return children + [further for child in children for further in descendants(child)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def replica_processes(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid in descendants(process.pid) if command(pid).startswith("ray::ServeReplica")]


def test_a_killed_replica_costs_only_its_own_requests(
    server: tuple[subprocess.Popen[str], httpx.Client], served: Served
) -> None:
    """Under load: begun streams, whole answers, and requests that arrive after the death."""
    process, client = server
    victims = replica_processes(process)
    assert len(victims) == 2 and client.get("/health").json() == {"replicas": 2, "wanted": 2}
    new = range(400, 408)  # no replica owns them, so the loads spread them
    want = together(lambda i: whole_text(served.http.post(CHAT, json=long_ask(i)).json()), new)
    readings = [Reading(client, long_ask(i)) for i in new]
    with ThreadPoolExecutor(40) as pool:
        wholes = [pool.submit(client.post, CHAT, json=long_ask(i)) for i in new[:6]]
        until(lambda: all(reading.events for reading in readings))
        assert len({reading.home for reading in readings}) == 2
        os.kill(victims[0], signal.SIGKILL)
        later = [pool.submit(client.post, CHAT, json=ask(i)) for i in range(20)]
        ends = [(reading, reading.join()[-1]) for reading in readings]
    lost = {reading.home for reading, last in ends if "error" in last}
    assert len(lost) == 1
    for (reading, last), text in zip(ends, want, strict=True):
        if reading.home in lost:
            assert last["error"]["code"] == "replica_lost"
        else:
            assert reading.text() == text
    for answer, text in zip([whole.result() for whole in wholes], want[:6], strict=True):
        assert answer.status_code == 200  # nothing of it was sent, so another replica could answer
        assert home(answer) not in lost and whole_text(answer.json()) == text
    assert {answer.result().status_code for answer in later} == {200}
    assert {home(answer.result()) for answer in later}.isdisjoint(lost)


def test_a_dead_engine_counts_as_a_dead_replica_and_both_are_replaced(
    server: tuple[subprocess.Popen[str], httpx.Client],
) -> None:
    process, client = server
    until(lambda: client.get("/health").json() == {"replicas": 2, "wanted": 2})
    inside = descendants(replica_processes(process)[0])
    (engine,) = [pid for pid in inside if "engine_process" in command(pid)]
    # The kill follows the first events at once: with four samples each, the streams last seconds.
    readings = [Reading(client, long_ask(i, n=4)) for i in range(100, 108)]
    until(lambda: all(reading.events for reading in readings))
    os.kill(engine, signal.SIGKILL)
    assert len({reading.home for reading in readings}) == 2
    later = together(lambda i: client.post(CHAT, json=ask(i)), range(20))
    assert {answer.status_code for answer in later} == {200}
    lost = {r.home for r in readings if r.join()[-1].get("error", {}).get("code") == "engine_dead"}
    assert len(lost) == 1 and {home(answer) for answer in later}.isdisjoint(lost)
    assert all("error" not in r.events[-1] for r in readings if r.home not in lost)


def test_sigterm_finishes_the_open_request_and_rejects_new_ones(
    server: tuple[subprocess.Popen[str], httpx.Client],
) -> None:
    process, client = server
    everything = descendants(process.pid)
    reading = Reading(client, long_ask(5))
    until(lambda: bool(reading.events))
    process.send_signal(signal.SIGTERM)
    until(lambda: client.get("/health").status_code == 503)
    refused = client.post(CHAT, json=ask(1))
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert reading.join()[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.wait(60) == 0
    until(lambda: not [pid for pid in everything if Path(f"/proc/{pid}").exists()])
