"""Everything at once, for SOAK_SECONDS: clients that ask, stream, read slowly, disconnect, send bad
requests and end their thinking, on a server that is short of everything.

Every answer equals that of the same request alone, and at the end no sequence, block or memory is
left. `make soak` runs it for minutes.
"""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from s1engine.config import BUNDLED_MODEL
from s1engine.eval.arithmetic import generate
from s1engine.models.model_config import ModelConfig
from tests.server.conftest import start_server
from tests.server.test_bad_requests import BAD
from tests.server.test_lifecycle import engine_of

SECONDS = float(os.environ.get("SOAK_SECONDS", "6"))
CLIENTS = 12
CHAT = "/v1/chat/completions"
FLAGS = ("--dtype", "float32", "--max-model-len", "448", "--max-num-seqs", "6")
FLAGS += ("--max-num-batched-tokens", "48", "--max-queued-requests", "4")
# barely more than one sequence of full length
TOKEN_BYTES = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.float32)
FLAGS += ("--kv-cache-memory-gb", str(1.05 * 448 * TOKEN_BYTES / 2**30))
MAX_GROWTH_BYTES = 48 * 2**20  # of a process between the middle and the end
HOW: list[dict[str, Any]] = [
    {},
    {"num_waits": 2},
    {"thinking_token_budget": 9},
    {"temperature": 1.1, "seed": 5, "n": 2},
    {"stop": ["Answer"]},
    {"thinking_checkpoints": [3, 9], "num_waits": 1},
    {"min_thinking_tokens": 150, "wait_text": "", "max_tokens": 250},
    {"structured_outputs": {"regex": "[0-9]{1,3}"}},
]
BODIES: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": item.question}],
        "max_tokens": 120,
        "temperature": 0,
        **HOW[i % len(HOW)],
    }
    for i, item in enumerate(generate(3, 16))
]

Answer = list[tuple[str, str, str]]


def answer_of(whole: dict[str, Any]) -> Answer:
    return [
        (c["message"]["reasoning"] or "", c["message"]["content"], c["finish_reason"])
        for c in whole["choices"]
    ]


class Client:
    """One of many; performs random actions and counts them."""

    def __init__(
        self, http: httpx.AsyncClient, alone: list[Answer], seed: int, done: Counter[str]
    ) -> None:
        self._http = http
        self._alone = alone
        self._chance = random.Random(seed)
        self._done = done

    async def run(self, end: float) -> None:
        moves = [self.ask, self.stream, self.stream_slowly, self.leave, self.give_up]
        moves += [self.poison, self.lie_about_size, self.hurry]
        while time.monotonic() < end:
            move = self._chance.choice(moves)
            await move()
            self._done[move.__name__] += 1

    def _pick(self) -> tuple[dict[str, Any], Answer]:
        i = self._chance.randrange(len(BODIES))
        return BODIES[i], self._alone[i]

    async def ask(self) -> None:
        body, wanted = self._pick()
        answer = await self._http.post(CHAT, json=body)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            self._done["refused"] += 1
            return
        assert answer.status_code == 200, answer.text
        assert answer_of(answer.json()) == wanted

    async def stream(self, pause: float = 0.0) -> None:
        body, wanted = self._pick()
        got = [["", "", ""] for _ in wanted]
        async for event in self._events(body):
            assert "error" not in event, event
            for choice in event["choices"]:
                delta, own = choice["delta"], got[choice["index"]]
                own[0] += delta.get("reasoning", "")
                own[1] += delta.get("content", "")
                own[2] += choice["finish_reason"] or ""
            await asyncio.sleep(pause)
        if any(own[2] for own in got):  # not refused
            assert [tuple(own) for own in got] == wanted

    async def stream_slowly(self) -> None:
        await self.stream(pause=0.02)

    async def leave(self) -> None:
        body, _ = self._pick()
        events = self._events(body)
        after = self._chance.randrange(6)
        async for _ in events:
            after -= 1
            if after < 0:
                break
        await events.aclose()

    async def give_up(self) -> None:
        body, _ = self._pick()
        asking = asyncio.ensure_future(self._http.post(CHAT, json=body))
        await asyncio.sleep(self._chance.random() * 0.2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    async def poison(self) -> None:
        path, change, _ = self._chance.choice(BAD)
        base = {"prompt": "a"} if path != CHAT else {"messages": BODIES[0]["messages"]}
        text = json.dumps({**base, **change})
        headers = {"content-type": "application/json"}
        answer = await self._http.post(path, content=text.encode(), headers=headers)
        assert answer.status_code in (400, 404, 413, 429), (change, answer.text)

    async def lie_about_size(self) -> None:
        url = self._http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {2**40}\r\n\r\n".encode())
        assert b" 413 " in await reader.readline()
        writer.close()

    async def hurry(self) -> None:
        """End the thinking of its own stream: the answer is shorter, but complete."""
        body = {**BODIES[0], "min_thinking_tokens": 60}
        last = ""
        async for event in self._events(body):
            await self._http.post(f"/v1/requests/{event['id']}/end_thinking")
            for choice in event["choices"]:
                last = choice["finish_reason"] or last
        assert last in ("stop", "length", "")

    async def _events(self, body: dict[str, Any]) -> Any:
        async with self._http.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            if answer.status_code == 429:
                self._done["refused"] += 1
                return
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


async def gauge(http: httpx.AsyncClient, name: str) -> float:
    text = (await http.get("/metrics")).text
    found = re.search(rf"^s1engine:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_nothing_is_lost_crossed_or_left_behind() -> None:
    process, url, log = start_server(*FLAGS)
    pids = (process.pid, engine_of(process))

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            alone = []
            for body in BODIES:
                alone.append(answer_of((await http.post(CHAT, json=body)).json()))
            done: Counter[str] = Counter()
            clients = [Client(http, alone, seed, done) for seed in range(CLIENTS)]
            memory = []
            for _ in range(2):
                end = time.monotonic() + SECONDS / 2
                await asyncio.gather(*(client.run(end) for client in clients))
                memory.append([resident_bytes(pid) for pid in pids])
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                for _ in range(500):
                    if await gauge(http, name) == 0:
                        break
                    await asyncio.sleep(0.02)
                assert await gauge(http, name) == 0, name
            for before, after in zip(*memory, strict=True):
                assert after - before < MAX_GROWTH_BYTES
            assert answer_of((await http.post(CHAT, json=BODIES[0])).json()) == alone[0]
            assert (await http.get("/health")).status_code == 200
            done["preemptions"] = int(await gauge(http, "num_preemptions_total"))
            print(dict(done))
            assert done["refused"] and done["preemptions"] and done["ask"] and done["stream"]

    try:
        asyncio.run(main())
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0, "".join(log)
