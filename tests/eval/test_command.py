"""``s1engine eval`` from end to end: files, figures of a run, bad options."""

import argparse
import json
from pathlib import Path

import pytest

from s1engine.errors import RequestError
from s1engine.eval import command
from s1engine.eval.runs import bootstrap_interval


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_a_sweep_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "arithmetic", "--budgets", "0,20,none", "--num-waits", "0,1"]
    assert command.run(parse(*words, "--limit", "8", "--seed", "5", "--out", str(tmp_path))) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert len(rows) == 6 * 8 and len(runs) == 6
    order = [(run["settings"]["num_waits"], run["settings"]["budget"]) for run in runs]
    assert order == [(0, 0), (0, 20), (0, None), (1, 0), (1, 20), (1, None)]
    for run in runs:
        own = [row for row in rows if row["settings"] == run["settings"]]
        assert len(own) == 8
        assert run["accuracy"] == pytest.approx(100 * sum(row["correct"] for row in own) / 8)
        assert run["thinking_tokens"] == sum(row["thinking_tokens"] for row in own) / 8
        low, high = run["interval"]
        assert 0 <= low <= run["accuracy"] <= high <= 100
        budget = run["settings"]["budget"]
        assert budget is None or all(row["thinking_tokens"] <= budget for row in own)
    assert runs[0]["thinking_tokens"] == 0 < runs[1]["thinking_tokens"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("accuracy") == 6


@pytest.mark.parametrize(
    ("flag", "value", "param"),
    [
        ("--budgets", "1,x", "budgets"),
        ("--num-waits", "-1", "num_waits"),
        ("--limit", "0", "limit"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, flag: str, value: str, param: str) -> None:
    words = ("--task", "arithmetic", "--out", str(tmp_path), f"{flag}={value}")
    with pytest.raises(RequestError) as error:
        command.run(parse(*words))
    assert error.value.param == param


def test_the_interval_narrows_with_more_questions() -> None:
    few, many = (bootstrap_interval([True, False] * n, 0) for n in (10, 1000))
    assert few[0] < many[0] < 50 < many[1] < few[1]
    assert bootstrap_interval([True] * 9, 0) == (100.0, 100.0)
