"""Coding agents, which are programs: each answers a task in a folder of its own."""

import json
import subprocess
from pathlib import Path

from tests.clients.conftest import environment, run_program

QUESTION = "a=3 b=a+4 b?"
CODEX = """\
model = "s1-nano"
model_provider = "s1engine"
model_context_window = 2048

[model_providers.s1engine]
name = "s1engine"
base_url = "{url}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""


def test_codex(variables: dict[str, str], tmp_path: Path) -> None:
    program = environment("javascript") / "node_modules/@openai/codex/bin/codex.js"
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex/config.toml").write_text(CODEX.format(url=variables["OPENAI_BASE_URL"]))
    command = ["node", str(program), "exec", "--skip-git-repo-check", "--json", QUESTION]
    events = [json.loads(line) for line in run_program(command, variables, tmp_path).splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    [message] = [item["text"] for item in items if item["type"] == "agent_message"]
    assert message.strip()
    assert events[-1]["type"] == "turn.completed"
    usage = events[-1]["usage"]
    assert usage["input_tokens"] > 0 and usage["output_tokens"] > 0


def test_aider(variables: dict[str, str], tmp_path: Path) -> None:
    program = environment("aider") / "bin/aider"
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (["git", "init", "--quiet"], ["git", "add", "code.py"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    flags = "--no-show-model-warnings --no-check-update --analytics-disable --no-auto-commits"
    flags += " --no-gitignore --yes-always --no-pretty --no-stream"
    command = [str(program), "--model", "openai/s1-nano", *flags.split(), "--message", QUESTION]
    told = run_program([*command, "code.py"], variables, tmp_path)
    assert "THINKING" in told and "ANSWER" in told  # reasoning_content, apart from the answer
    assert told.rpartition("ANSWER")[2].replace("*", "").strip()
    assert "Tokens: " in told
