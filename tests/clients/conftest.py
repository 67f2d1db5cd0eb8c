"""The server of the client tests, and how their scripts run, each in an environment of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import KEY, start_server

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(sys.prefix) / "clients"  # of `make clients`
SCRIPT_S = 240


def environment(name: str) -> Path:
    """The environment of this name. Skips the test where `make clients` has not made it."""
    if os.environ.get("CLIENTS") is None:
        pytest.skip("run by `make clients`")
    folder = ENVIRONMENTS / name
    if not (folder / "installed").exists():
        pytest.skip(f"the environment {name} is missing: `make clients` could not install it")
    return folder


@pytest.fixture(scope="session")
def nano_url() -> Iterator[str]:
    """A server with s1-nano, whose template cuts the long prompts of agents."""
    flags = ("--api-key", KEY, "--dtype", "float32", "--chat-template", str(HERE / "nano.jinja"))
    process, url, log = start_server(*flags)
    yield url
    process.terminate()
    assert process.wait(30) == 0, "".join(log)


@pytest.fixture
def nano_http(nano_url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=nano_url, headers=headers, timeout=60) as http:
        yield http


@pytest.fixture
def variables(nano_url: str, tmp_path: Path) -> dict[str, str]:
    """What every client reads its server from; a home of its own, and no network."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "OPENAI_BASE_URL": f"{nano_url}/v1",
        "OPENAI_API_BASE": f"{nano_url}/v1",
        "OPENAI_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": nano_url,
        "ANTHROPIC_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }


def run_program(command: list[str], variables: dict[str, str], folder: Path) -> str:
    """Run a program to its end; return its stdout. Its stderr is shown if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SCRIPT_S,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def last_object(stdout: str) -> dict[str, Any]:
    """The JSON object on the last line of a script's output."""
    results: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
    return results
