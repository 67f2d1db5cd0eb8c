"""Processes that are stopped and killed while clients ask, for CHAOS_SECONDS.

Each client records what it saw of a request; a small model of a server says what it may have seen:
one answer, whole and the same as alone, or one error after a beginning of that answer.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.server.conftest import start_server
from tests.server.test_lifecycle import children_of
from tests.server.test_soak import BODIES, CHAT, Answer, answer_of, gauge

SECONDS = float(os.environ.get("CHAOS_SECONDS", "2"))
FLAGS = ("--dtype", "float32", "--max-model-len", "448", "--max-num-seqs", "6")
FLAGS += ("--engine-restarts", "1000")
CLIENTS = 6
ERRORS = {"engine_dead", "grammar_not_checked"}


@dataclass
class Record:
    """What a client saw of one request."""

    wanted: Answer
    status: int = 0
    code: str | None = None  # of an error
    ids: set[str] = field(default_factory=set)
    texts: list[list[str]] = field(default_factory=list)  # reasoning, content, reason; by choice
    ends: int = 0  # of the stream

    def add(self, event: dict[str, Any]) -> None:
        """An event of the stream: none follows an error, nor the end of its choice."""
        assert self.code is None and not self.ends
        if "error" in event:
            self.code = event["error"]["code"]
            return
        self.ids.add(event["id"])
        for choice in event["choices"]:
            own = self.texts[choice["index"]]
            assert not own[2]
            own[0] += choice["delta"].get("reasoning", "")
            own[1] += choice["delta"].get("content", "")
            own[2] = choice["finish_reason"] or ""

    def check(self) -> str:
        """Compares with the model; returns what happened."""
        if self.status != 200:
            assert self.status == 503 and self.code in ERRORS, (self.status, self.code)
            return "refused"
        assert len(self.ids) <= 1 and self.ends == 1
        if self.code is None:
            assert [tuple(own) for own in self.texts] == self.wanted
            return "answered"
        assert self.code == "engine_dead"
        for own, whole in zip(self.texts, self.wanted, strict=True):
            assert whole[0].startswith(own[0]) and whole[1].startswith(own[1])
        return "broken off"


async def ask(http: httpx.AsyncClient, body: dict[str, Any], record: Record) -> None:
    record.texts = [["", "", ""] for _ in record.wanted]
    async with http.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        record.status = answer.status_code
        if answer.status_code != 200:
            record.code = json.loads(await answer.aread())["error"]["code"]
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                record.ends += 1
            elif line:
                record.add(json.loads(line.removeprefix("data: ")))


def child(process: subprocess.Popen[str], module: str) -> int | None:
    """The server's child that runs ``module``, if there is one."""
    for pid in children_of(process.pid):
        try:
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            pass
    return None


async def until_healthy(http: httpx.AsyncClient) -> None:
    while (await http.get("/health")).status_code != 200:
        await asyncio.sleep(0.05)


async def disturb(
    process: subprocess.Popen[str], http: httpx.AsyncClient, chance: random.Random
) -> None:
    """Stops both processes for a moment, and kills them."""
    for module, number in (
        ("engine_process", signal.SIGSTOP),
        ("grammar_worker", signal.SIGSTOP),
        ("grammar_worker", signal.SIGKILL),
        ("engine_process", signal.SIGKILL),
    ):
        await asyncio.sleep(chance.random() / 2)
        if (pid := child(process, module)) is None:
            continue
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            await asyncio.sleep(chance.random() / 4)
            os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(0.2)
    await until_healthy(http)


def test_each_request_is_answered_once_or_fails_once() -> None:
    process, url, log = start_server(*FLAGS)
    records: list[Record] = []
    chance = random.Random(0)

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            alone = [answer_of((await http.post(CHAT, json=body)).json()) for body in BODIES]
            end, done = time.monotonic() + SECONDS, asyncio.Event()

            async def client() -> None:
                while not done.is_set():
                    i = chance.randrange(len(BODIES))
                    records.append(record := Record(alone[i]))
                    # A request that two engines died of is refused: no two are equal.
                    await ask(http, {"seed": len(records), **BODIES[i]}, record)
                    await asyncio.sleep(0.05 if record.status == 200 else 0.2)

            clients = [asyncio.ensure_future(client()) for _ in range(CLIENTS)]
            await disturb(process, http, chance)
            while time.monotonic() < end:
                await disturb(process, http, chance)
            done.set()
            await asyncio.gather(*clients)
            assert answer_of((await http.post(CHAT, json=BODIES[0])).json()) == alone[0]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                while await gauge(http, name):
                    await asyncio.sleep(0.02)

    try:
        asyncio.run(main())
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0, "".join(log)
    seen = Counter(record.check() for record in records)
    ids = [name for record in records for name in record.ids]
    assert len(ids) == len(set(ids))
    print(dict(seen))
    assert seen["answered"] and seen["broken off"] + seen["refused"]
