"""A client that disconnects, streaming or not, frees everything; a failed engine is reported."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.server.app import create_app

LONG = {
    "messages": [{"role": "user", "content": "a=1 b=a+1 b?"}],
    "min_thinking_tokens": 1800,
    "wait_text": "",
}


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[tuple[AsyncLLMEngine, httpx.AsyncClient]]:
    """A server on this loop, whose engine the test can inspect."""
    engine = AsyncLLMEngine(EngineConfig(dtype="float32"))
    await engine.start()
    config = uvicorn.Config(create_app(engine), port=0, log_level="warning")
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield engine, client
    running.should_exit = True
    await task


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never became true")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_blocks(stream: bool, n: int) -> None:
    async def main() -> None:
        async with server() as (engine, client):
            free = engine.engine.scheduler.stats().num_free_blocks
            body = {**LONG, "stream": stream, "n": n}
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await until(lambda: engine.engine.scheduler.stats().num_sampled_tokens > 20)
            asking.cancel()
            await until(lambda: not engine.engine.has_unfinished)
            assert engine.engine.scheduler.stats().num_free_blocks == free
            assert engine.engine.scheduler.stats().num_sampled_tokens < 1500 * n
            engine.engine.scheduler.check_integrity()
            assert (await client.get("/health")).status_code == 200

    asyncio.run(main())


def test_a_failed_engine_is_unhealthy_and_ends_what_is_open() -> None:
    async def main() -> None:
        async with server() as (engine, client):

            def fail(step: Any) -> Any:
                raise RuntimeError("the device is gone")

            async with client.stream(
                "POST", "/v1/chat/completions", json={**LONG, "stream": True}
            ) as stream:
                lines = stream.aiter_lines()
                await anext(lines)
                engine.engine.runner.execute = fail  # type: ignore[method-assign]
                engine.engine.runner.decode_loop = None
                rest = [line async for line in lines if line]
            assert "engine_dead" in rest[-2] and rest[-1] == "data: [DONE]"
            assert (await client.get("/health")).status_code == 503
            again = await client.post("/v1/chat/completions", json=LONG)
            assert again.status_code == 503 and again.json()["error"]["code"] == "engine_dead"

    asyncio.run(main())
