"""The types of the package as a user's ``mypy --strict`` sees them, with none of our config."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "user_programs"
SKIPPED = (
    "torch transformers triton tokenizers safetensors llguidance tqdm huggingface_hub ray openai"
)
"""Packages whose types no public signature has: without them mypy takes seconds, not minutes."""
CONFIG = "[mypy]\nstrict = True\n[mypy-{}]\nfollow_imports = skip\n"
LINE = re.compile(r"(\w+\.py):(\d+): error: ")


def install(site: Path) -> None:
    """The package in the place that it has when installed."""
    package = site / "s1engine"
    package.mkdir(parents=True)
    for path in [*(ROOT / "s1engine").iterdir(), *(ROOT / name for name in ("kernels", "bench"))]:
        (package / path.name).symlink_to(path)


def test_strict_mypy_accepts_what_is_right_and_nothing_else(tmp_path: Path) -> None:
    install(tmp_path / "site")
    app = tmp_path / "app"
    shutil.copytree(PROGRAMS, app, ignore=shutil.ignore_patterns("__pycache__"))
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, app)
    skipped = ",".join(f"{name}.*" for name in SKIPPED.split())
    (app / "mypy.ini").write_text(CONFIG.format(skipped))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "."],
        cwd=app,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = [(name, int(line)) for name, line in LINE.findall(done.stdout)]
    lines = (PROGRAMS / "wrong.py").read_text().splitlines()
    marked = [i for i, line in enumerate(lines, 1) if line.endswith("# error")]
    assert len(marked) > 10
    assert sorted(set(found)) == [("wrong.py", line) for line in marked], done.stdout
