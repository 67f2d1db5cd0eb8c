"""The code of docs/CLIENTS.md is code of the scripts that `make clients` runs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCES = {
    "python": "tests/clients/scripts/*.py",
    "js": "tests/clients/javascript/*.mjs",
    "toml": "tests/clients/test_programs.py",
}


def test_code_is_tested_code() -> None:
    """Each block of Python or JavaScript stands in one script, line by line."""
    blocks = FENCE.findall((ROOT / "docs/CLIENTS.md").read_text())
    assert len(blocks) > 12
    for language, code in blocks:
        if language not in SOURCES:
            continue
        lines = {line.strip() for line in code.splitlines() if line.strip()}
        sources = [path.read_text() for path in ROOT.glob(SOURCES[language])]
        wrong = min((sorted(lines - set(map(str.strip, s.splitlines()))) for s in sources), key=len)
        assert wrong == [], code


def test_flags_of_programs_are_tested_flags() -> None:
    """Each flag of a shell recipe stands in a test of these programs."""
    blocks = FENCE.findall((ROOT / "docs/CLIENTS.md").read_text())
    tests = "".join(
        (ROOT / f"tests/clients/test_{n}.py").read_text() for n in ("evaluations", "programs")
    )
    for language, code in blocks:
        if language == "sh":
            for flag in re.findall(r"(?<=\s)--[\w-]+", code):
                assert f'"{flag}"' in tests, flag


def test_every_client_has_a_recipe() -> None:
    page = (ROOT / "docs/CLIENTS.md").read_text()
    scripts = [
        *ROOT.glob("tests/clients/scripts/*.py"),
        *ROOT.glob("tests/clients/javascript/*.mjs"),
    ]
    named = [path.name for path in scripts if not path.stem.startswith("common")]
    assert [name for name in named if name not in page] == []
    bodies = {path.name.split("_")[0] for path in ROOT.glob("tests/clients/bodies/*.json")}
    assert [name for name in bodies if name not in page.lower().replace(" ", "")] == []
