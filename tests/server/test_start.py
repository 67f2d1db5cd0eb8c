"""The start of ``s1engine serve``: two processes that import side by side."""

import json
import subprocess
import sys
from typing import Any

import pytest

from s1engine.cli import main
from s1engine.engine import spawning

HEAVY = ("torch", "transformers", "triton", "llguidance", "matplotlib", "s1engine.ops")

SERVE = """
import json, sys
from s1engine.cli import main, serve
spawn, found = serve.spawn_engine, {}

def watched():
    found["before"] = sorted(sys.modules)
    return spawn()

def finish(args, listeners, app, engine, admission):
    print(json.dumps({**found, "ready": sorted(sys.modules)}))
    engine._child.kill()
    return 0

serve.spawn_engine, serve._run_server = watched, finish
sys.exit(main(["serve", "--port", "0"]))
"""


def test_the_engines_process_starts_first_and_the_server_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert not {"numpy", "pydantic", "fastapi", "asyncio", *HEAVY} & set(found["before"])
    assert "fastapi" in found["ready"] and not set(HEAVY) & set(found["ready"])


@pytest.mark.parametrize(
    "flags", [["--reasoning-effort-budgets", "low"], ["--host", "0.0.0.0"], ["/no/model"]]
)
def test_a_start_that_is_refused_leaves_no_process(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []

    def watched() -> spawning.SpawnedProcess:
        started.append(spawning.spawn_engine())
        return started[-1]

    monkeypatch.setattr("s1engine.cli.serve.spawn_engine", watched)
    assert main(["serve", "--port", "0", *flags]) in (1, 2)
    assert capsys.readouterr().err
    (spawned,) = started
    assert spawned.process.returncode is not None
