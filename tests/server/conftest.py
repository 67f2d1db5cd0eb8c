"""A server process for all tests of this folder, and the same model in this process."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from s1engine.engine.llm import LLM

KEY = "secret-of-the-tests"
START_S = 120


@dataclass(frozen=True)
class Served:
    """The server's address, and clients with its key."""

    url: str
    http: httpx.Client
    client: openai.OpenAI


def start_server(*flags: str, **env: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """Start a server; return the process, its address, and its growing log."""
    process = launch_server(subprocess.PIPE, None, *flags, **env)
    log: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        log.append(line)
        found = re.search(r"running on (http://\S+)", line)
        if found:
            threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
            return process, found.group(1), log
    raise AssertionError(f"the server did not start:\n{''.join(log)}")


def launch_server(
    stderr: int, stdout: int | None, *flags: str, **env: str
) -> subprocess.Popen[str]:
    """Start a server on a free port, in a process group of its own."""
    command = [str(Path(sys.executable).parent / "s1engine"), "serve", "--port", "0", *flags]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, stderr=stderr, stdout=stdout, text=True, env=env, process_group=0
    )


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    process, url, log = start_server("--api-key", KEY, "--dtype", "float32")
    headers = {"Authorization": f"Bearer {KEY}"}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        yield Served(url, http, client)
    process.terminate()
    assert process.wait(30) == 0, "".join(log)


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(progress=False, dtype="float32")
