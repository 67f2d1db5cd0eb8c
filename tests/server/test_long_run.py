"""What a request leaves behind in the server and in the engine, counted over many of them."""

import asyncio
import gc
import urllib.parse
from collections import Counter
from typing import Any

import httpx
import pytest

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.runner import input_batch
from s1engine.server import error_handlers, middleware
from s1engine.server.api.field_rules import nearest
from s1engine.server.app import create_app

ROUNDS = 30
MAX_LEFT = 0.5  # objects for each request; a leak is at least 1
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def bodies(i: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of every kind, which differ from round to round."""
    messages = [{"role": "user", "content": f"a={i} b=a+1 b?"}]
    short = {"max_tokens": 3, "temperature": 1, "seed": i}
    return [
        (CHAT, {"messages": messages, **short, "n": 2}),
        (CHAT, {"messages": messages, **short, "stream": True, "thinking_checkpoints": [1]}),
        (CHAT, {"messages": messages, **short, "user": f"user {i}", "cache_salt": f"salt {i}"}),
        (COMPLETION, {"prompt": f"a={i}", **short, "logprobs": 1, "stop": [f"x{i}"]}),
        (COMPLETION, {"prompt": [f"a={i}", f"b={i}"], **short, "timeout": 100}),
        (COMPLETION, {"prompt": "a", "max_tokens": -i - 1}),
        (CHAT, {"messages": messages, f"unknown_{i}": i}),
        ("/tokenize", {"prompt": f"text {i}"}),
        (f"/v1/requests/{i}/end_thinking", {}),
        (f"/no/such/path/{i}", {}),
    ]


def objects() -> Counter[str]:
    urllib.parse.clear_cache()
    nearest.cache_clear()  # bounded
    gc.collect()
    return Counter(type(obj).__qualname__ for obj in gc.get_objects())


def test_requests_leave_no_objects_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the recorded steps and the views, which are kept by size of a step, up to a bound."""
    monkeypatch.setattr(input_batch, "CACHED_VIEWS", 0)
    for module in (error_handlers, middleware):
        monkeypatch.setattr(module.logger, "disabled", True)  # pytest keeps its lines

    async def main() -> None:
        config = EngineConfig(dtype="float32", max_num_seqs=8, enforce_eager=True)
        engine = AsyncLLMEngine(config)
        await engine.start()
        transport = httpx.ASGITransport(create_app(engine, api_keys=["k"]))
        headers = {"authorization": "Bearer k"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", headers=headers
        ) as http:
            statuses: Counter[int] = Counter()

            async def run(rounds: range) -> Counter[str]:
                for i in rounds:
                    sent = [http.post(path, json=body) for path, body in bodies(i)]
                    answers = await asyncio.gather(*sent)
                    statuses.update(answer.status_code for answer in answers)
                assert (await http.get("/metrics")).status_code == 200
                return objects()

            before = await run(range(10))
            after = await run(range(10, 10 + ROUNDS))
        assert set(statuses) == {200, 400, 404}
        grown = {name: n for name, n in (after - before).items() if n > MAX_LEFT * ROUNDS}
        assert not grown, grown
        await engine.shutdown()

    asyncio.run(main())
