"""README.md does what it says: its python blocks and its `s1engine` command lines run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
TIMEOUT_S = 240
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """Bodies of the fenced blocks of one language, in order."""
    return [body for name, body in BLOCK.findall(text) if name == language]


def command_lines(text: str) -> list[str]:
    """Lines of the sh blocks that start with `s1engine `, continuations joined; no servers."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [
        line for line in lines if line.startswith("s1engine ") and line.split()[1:2] != ["serve"]
    ]


def readme() -> str:
    return README.read_text() if README.exists() else ""


def run(command: list[str], folder: Path) -> None:
    """Runs in an empty folder, with this interpreter's scripts first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_readme_has_examples() -> None:
    assert blocks(readme(), "python"), "README.md is absent or has no python block"
    assert command_lines(readme()), "README.md is absent or shows no s1engine command"


@pytest.mark.parametrize("code", blocks(readme(), "python"))
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    run([sys.executable, "-c", code], tmp_path)


@pytest.mark.parametrize("line", command_lines(readme()))
def test_command_line_runs(line: str, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", line], tmp_path)


def test_the_finders_find() -> None:
    text = "```sh\nmake serve\ns1engine serve\ns1engine info \\\n  x\n```\n```python\n1\n```\n"
    assert blocks(text, "python") == ["1\n"]
    assert [line.split() for line in command_lines(text)] == [["s1engine", "info", "x"]]


def test_a_failing_block_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run([sys.executable, "-c", "1 / 0"], tmp_path)


def test_python_blocks_of_the_embedding_page_run(tmp_path: Path) -> None:
    """In one process: later blocks use what earlier ones define."""
    code = "\n".join(blocks((README.parent / "docs" / "EMBEDDING.md").read_text(), "python"))
    assert code.count("import") > 3
    run([sys.executable, "-c", code], tmp_path)
