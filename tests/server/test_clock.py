"""A wall clock that jumps by hours at each reading changes only the dates in responses: timeouts
fire on time, and the server drains in order."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import start_server
from tests.server.test_lifecycle import CHAT, LONG, SHORT, Stream, health

SHIM = Path(__file__).parent / "jumping_clock.c"
WIDE = {"timeout": 1800, "thinking_deadline_ms": 1_800_000}  # half of a jump


def test_a_jumping_wall_clock_is_not_noticed(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    shim = tmp_path / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, SHIM], check=True)
    flags = ("--dtype", "float32", "--shutdown-timeout", "1800")
    process, url, log = start_server(*flags, LD_PRELOAD=str(shim))
    try:
        with httpx.Client(base_url=url, timeout=60) as client:

            def ask(**fields: Any) -> httpx.Response:
                return client.post(CHAT, json={**SHORT, "stream": False, **fields})

            answers = [ask(**WIDE).json() for _ in range(6)]
            dates = [answer["created"] for answer in answers]
            assert max(dates) - min(dates) > 3000, "the clock does not jump"
            assert len({str(answer["choices"]) for answer in answers}) == 1
            assert answers[0]["usage"]["thinking"]["end_reason"] == "natural"
            assert ask(**{**LONG, "stream": False}, timeout=0.001).status_code == 504
            ended = ask(min_thinking_tokens=0, num_waits=1000, thinking_deadline_ms=1).json()
            assert ended["usage"]["thinking"]["end_reason"] == "deadline"
            stream = Stream(client, {**LONG, **WIDE, "min_thinking_tokens": 500})
            process.send_signal(signal.SIGTERM)
            while health(client) == 200:
                pass
            events = stream.join()
            assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(60) == 0, "".join(log)
    finally:
        process.kill()
        process.wait()
