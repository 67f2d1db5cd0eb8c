"""The compile report: every kernel compiles for an H100 as in the committed table."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from s1engine.kernels.compile_report import MAX_SHARED, TABLE, Compiled, compare, markdown

FINE = Compiled(
    kernel="x",
    warps=4,
    stages=3,
    registers=96,
    stack=0,
    spills=0,
    shared=70_000,
    wgmma=0,
    mma=32,
    loads128=16,
    early=4,
)


@pytest.mark.timeout(900)
def test_cases_compile_as_committed() -> None:
    """Each sixth one: all take four minutes (`make kernels-report ARGS=--check`)."""
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "s1engine.kernels.compile_report", "--check", "--every", "6"]
    done = subprocess.run(command, env=compiled, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"shared": MAX_SHARED + 1}, "shared memory"),
        ({"mma": 0}, "no tensor-core"),
        ({"early": -1}, "does not wait"),
        ({"early": 0}, "before the wait"),
    ],
)
def test_problems_are_reported(change: dict[str, int], problem: str) -> None:
    assert FINE.problems(True, True) == []
    (message,) = replace(FINE, **change).problems(True, True)  # type: ignore[arg-type]
    assert problem in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("registers", 97), ("shared", 70_001), ("mma", 31), ("loads128", 15), ("early", 3)],
)
def test_regressions_are_reported(name: str, value: int) -> None:
    committed = {"a": asdict(FINE)}
    assert compare({"a": FINE}, committed) == []
    worse = replace(FINE, **{name: value})  # type: ignore[arg-type]
    assert compare({"a": worse}, committed) == [f"a: {name} {getattr(FINE, name)} -> {value}"]
    better = replace(FINE, registers=80, loads128=32)
    assert compare({"a": better}, committed) == []


def test_new_and_missing_cases_are_reported() -> None:
    problems = compare({"new": FINE}, {"old": asdict(FINE)})
    assert problems == ["new: not in the committed table", "old: gone"]


def test_the_page_shows_the_committed_table() -> None:
    tables = json.loads(TABLE.read_text())
    assert TABLE.with_suffix(".md").read_text() == markdown(tables)
    assert all(row["spills"] == 0 for table in tables.values() for row in table.values())
